"""Episodes of an environment, simulated here: first the states and actions of all, then the frame of each state."""

import contextlib
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jepax.data.episodes import Trajectories
from jepax.envs import ENVIRONMENTS, Environment, NoisyExpert, Policy, RandomPolicy, collect
from jepax.types import UserError

POLICIES: dict[str, Policy] = {"expert": NoisyExpert(), "random": RandomPolicy()}
"""Policies that data is collected with, by name."""
MAX_STEPS = 100
"""Actions of an episode that does not reach its goal; 100 in the published data of Two-Room."""
SIMULATED_BATCH, RENDER_BATCH = 256, 512
"""Episodes that are simulated by one call, and states that are rendered: always as many, for one program each."""


def make_environment(name: str, image_size: int | None = None) -> Environment:
    """Makes an environment; None: its own image size. Raises `UserError` for a size that it does not draw."""
    env = ENVIRONMENTS[name]()  # pyrefly: ignore[missing-argument]
    if image_size in (None, env.image_size):
        return env
    if not type(env).__dataclass_fields__["image_size"].init:
        raise UserError(f"image_size={image_size}: {name} draws images of {env.image_size} pixels")
    return ENVIRONMENTS[name](image_size=image_size)


def simulate(
    env: Environment, policy: Policy, num_episodes: int, seed: int, *, pool: int = 0, max_steps: int = MAX_STEPS
) -> Trajectories:
    """Simulates episodes on the CPU. `pool`: 0 for training, 1 for tests.

    Always the same number at once, for one program; so n episodes are the first n of more.
    """
    key, found = jr.fold_in(jr.key(seed), pool), []
    with on_cpu():
        for number in range(-(-num_episodes // SIMULATED_BATCH)):
            found.append(collect(env, policy, SIMULATED_BATCH, jr.fold_in(key, number), max_steps))
    columns = zip(*((part.states, part.actions, part.length) for part in found), strict=True)
    states, actions, steps = (np.concatenate(column)[:num_episodes] for column in columns)

    # n steps lead from state 0 to state n, which no action leaves; what is behind is padding.
    is_row = np.arange(max_steps + 1) <= steps[:, None]
    actions = np.pad(actions, ((0, 0), (0, 1), (0, 0)))
    return Trajectories(actions[is_row], states[is_row], steps.astype(np.int64) + 1)


def render(
    env: Environment, states: Float32[np.ndarray, "rows state"]
) -> UInt8[np.ndarray, "rows height width channels"]:
    """Renders the frame of each state, on the CPU."""
    frames = np.empty((len(states), *frame_shape(env)), np.uint8)
    with on_cpu():
        for first in range(0, len(states), RENDER_BATCH):
            here = np.arange(first, first + RENDER_BATCH)
            part = frames[first : first + RENDER_BATCH]
            part[:] = _render_batch(env, states[np.minimum(here, len(states) - 1)])[: len(part)]
    return frames


@eqx.filter_jit
def _render_batch(env: Environment, states: Float[Array, "batch state"]) -> UInt8[Array, "batch height width channels"]:
    return jax.vmap(env.render)(states)


def frame_shape(env: Environment) -> tuple[int, ...]:
    """Height, width and channels of a frame."""
    return jax.eval_shape(env.render, jnp.zeros(env.state_dim)).shape


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Runs JAX on the CPU, if JAX_PLATFORMS allows it: episodes are the same with and without a GPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        yield
