"""Episodes: a policy acts in an environment until it reaches the goal. Many episodes are one program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.envs.base import Environment, State
from jepax.envs.policies import Policy


class Episode(eqx.Module):
    """One episode, or many: those of `collect` have an axis in front."""

    states: Float[Array, "*episodes states state"]
    """Every state: the start, and one after each of `max_steps` actions."""
    actions: Float[Array, "*episodes steps action"]
    """Action t leads from state t to state t + 1."""
    length: Int[Array, "*episodes"]
    """Steps until the goal is reached. After them the state stays, and actions are zero."""


def rollout(env: Environment, policy: Policy, start: State, goal: State, key: PRNGKeyArray, max_steps: int) -> Episode:
    """One episode. It ends after the step that reaches the goal: a start within the goal takes one step, too."""

    def act(carry, key):
        state, last_action, done = carry
        key_policy, key_step = jr.split(key)

        # Act; after the episode's end, stay.
        action = policy(env, state, goal, last_action, key_policy)
        action = jnp.where(done, 0.0, action)
        after = jnp.where(done, state, env.step(state, action, key_step))

        return (after, action, done | env.reached(after, goal)), (after, action, ~done)

    first = (start, jnp.zeros(env.action_dim), jnp.array(False))
    _, (states, actions, running) = lax.scan(act, first, jr.split(key, max_steps))
    return Episode(jnp.concatenate([start[None], states]), actions, jnp.sum(running))


@eqx.filter_jit
def collect(env: Environment, policy: Policy, num_episodes: int, key: PRNGKeyArray, max_steps: int) -> Episode:
    """Episodes from random starts to random goals, in parallel."""

    def episode(key):
        key_reset, key_rollout = jr.split(key)
        start, goal = env.reset(key_reset)
        return rollout(env, policy, start, goal, key_rollout, max_steps)

    return jax.vmap(episode)(jr.split(key, num_episodes))
