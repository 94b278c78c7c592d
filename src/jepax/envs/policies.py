"""Policies: functions of an environment's state that choose the next action, to be used inside `lax.scan`."""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.envs.base import Action, Environment, State
from jepax.envs.two_room_pldm import MAX_STEP

CONCENTRATION = 5.0  # of the von Mises distribution of a walk's turns
MEAN_LENGTH, LENGTH_STD = 1.0, 0.4  # pixels of a walk's step, truncated at 2 standard deviations
NUM_ANGLES = 4096  # size of the table of von Mises angles


class Policy(eqx.Module):
    """Chooses an action, each number in [-1, 1]. `last_action` is zero before an episode's first step."""

    @abc.abstractmethod
    def __call__(
        self, env: Environment, state: State, goal: State, last_action: Action, key: PRNGKeyArray
    ) -> Action: ...


class RandomPolicy(Policy):
    """Actions uniform in [-1, 1]."""

    def __call__(self, env: Environment, state: State, goal: State, last_action: Action, key: PRNGKeyArray) -> Action:
        return jr.uniform(key, (env.action_dim,), minval=-1, maxval=1)


class Expert(Policy):
    """The environment's expert, without noise."""

    def __call__(self, env: Environment, state: State, goal: State, last_action: Action, key: PRNGKeyArray) -> Action:
        return jnp.clip(env.expert(state, goal), -1, 1)


class NoisyExpert(Policy):
    """The environment's expert plus Gaussian noise, clipped: the published data of Two-Room."""

    noise_std: float = 2.0
    """Standard deviation of the noise on each number of an action."""
    repeat_prob: float = 0.05
    """Probability that the last action is repeated instead."""

    def __call__(self, env: Environment, state: State, goal: State, last_action: Action, key: PRNGKeyArray) -> Action:
        key_noise, key_repeat = jr.split(key)
        noise = self.noise_std * jr.normal(key_noise, (env.action_dim,))
        repeat = jr.bernoulli(key_repeat, self.repeat_prob) & jnp.any(last_action != 0)
        return jnp.where(repeat, last_action, jnp.clip(env.expert(state, goal) + noise, -1, 1))


class VonMisesWalk(Policy):
    """PLDM's random walk in `TwoRoomPLDM`: each direction is the last one plus a von Mises angle; the first is uniform.

    The length of a step is normal and truncated, independent of the last one.
    """

    def __call__(self, env: Environment, state: State, goal: State, last_action: Action, key: PRNGKeyArray) -> Action:
        key_first, key_turn, key_length = jr.split(key, 3)
        last = jnp.arctan2(last_action[1], last_action[0])
        turned = last + sample_von_mises(key_turn, CONCENTRATION)
        is_first = jnp.all(last_action == 0)
        direction = jnp.where(is_first, jr.uniform(key_first, minval=-jnp.pi, maxval=jnp.pi), turned)
        length = MEAN_LENGTH + LENGTH_STD * jr.truncated_normal(key_length, -2, 2)
        return length / MAX_STEP * jnp.stack([jnp.cos(direction), jnp.sin(direction)])


def sample_von_mises(key: PRNGKeyArray, concentration: float) -> Float[Array, ""]:
    """An angle in [-pi, pi] with density proportional to exp(concentration * cos(angle)), from a table of its CDF."""
    angles = np.linspace(-np.pi, np.pi, NUM_ANGLES)
    density = np.exp(concentration * (np.cos(angles) - 1))
    cdf = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return jnp.interp(jr.uniform(key), jnp.asarray(cdf / cdf[-1], jnp.float32), jnp.asarray(angles, jnp.float32))
