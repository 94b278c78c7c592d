"""The gradient guard: skips steps that are not finite, and clips or skips gradient spikes.

Its memory is part of the train state, so a resumed run decides as an uninterrupted one.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jepax.trees import global_norm
from jepax.types import Metrics, UserError

T = TypeVar("T")
MEDIAN_WINDOW, MIN_KNOWN_NORMS = 128, 32
"""Gradient norms whose median is the usual norm, and how many are needed before anything counts as a spike."""


class Action(enum.IntEnum):
    """The guard's decision on a step."""

    OFF = -1  # training has stopped: no step changes anything
    APPLIED = 0
    CLIPPED = 1
    SKIPPED = 2
    NONFINITE = 4


SPIKE_ACTIONS = {"off": Action.APPLIED, "clip": Action.CLIPPED, "skip": Action.SKIPPED}


@dataclass(frozen=True)
class GradGuardConfig:
    """Handling of steps that would harm the run."""

    max_consecutive_nonfinite: int = 10
    """Consecutive steps with a non-finite loss or gradient (each changes nothing) before the run stops with a dump."""
    on_spike: Literal["off", "clip", "skip"] = "clip"
    """Handling of a gradient spike: none, clip the gradient to the limit, or skip the step."""
    spike_threshold: float = 10.0
    """A spike is a gradient norm above this factor times the median of the last 128 steps' norms."""

    def __post_init__(self) -> None:
        count, factor = self.max_consecutive_nonfinite, self.spike_threshold
        if count < 1:
            raise UserError(f"train.grad_guard.max_consecutive_nonfinite={count} must be at least 1")
        if factor <= 1:
            raise UserError(f"train.grad_guard.spike_threshold={factor} must be above 1, the usual norm; try 10")


class GradGuardState(eqx.Module):
    """The guard's memory of earlier steps."""

    norms: Float[Array, "window"]
    """Finite gradient norms of the newest steps, at step modulo window; NaN where there is none."""
    consecutive_nonfinite: Int[Array, ""]
    """Steps up to now, without a break, whose loss or gradient was not finite."""
    num_skipped: Int[Array, ""]
    """Steps so far that changed nothing."""

    @staticmethod
    def new() -> "GradGuardState":
        return GradGuardState(jnp.full(MEDIAN_WINDOW, jnp.nan, jnp.float32), jnp.int32(0), jnp.int32(0))

    def limit(self, config: GradGuardConfig) -> Float[Array, ""]:
        """Largest gradient norm that is no spike; infinite while too few norms are known, or if spikes are allowed."""
        known = jnp.sum(jnp.isfinite(self.norms))
        limit = config.spike_threshold * jnp.nanmedian(self.norms)
        return jnp.where((known >= MIN_KNOWN_NORMS) & (config.on_spike != "off"), limit, jnp.inf)

    def classify(self, config: GradGuardConfig, loss: Float[Array, ""], norm: Float[Array, ""]) -> Int[Array, ""]:
        """Decide the `Action` for a step with this loss and gradient norm."""
        action = jnp.where(norm > self.limit(config), SPIKE_ACTIONS[config.on_spike], Action.APPLIED)
        action = jnp.where(jnp.isfinite(loss) & jnp.isfinite(norm), action, Action.NONFINITE)
        is_off = self.consecutive_nonfinite >= config.max_consecutive_nonfinite
        return jnp.where(is_off, Action.OFF, action).astype(jnp.int32)

    def scale(self, config: GradGuardConfig, action: Int[Array, ""], norm: Float[Array, ""]) -> Float[Array, ""]:
        """Factor for the gradient: 1, or limit / norm if it is clipped."""
        return jnp.where(action == Action.CLIPPED, self.limit(config) / norm, 1.0)

    def update(self, action: Int[Array, ""], norm: Float[Array, ""], step: Int[Array, ""]) -> "GradGuardState":
        """Record a step. Spikes are recorded too: a gradient that stays large soon counts as usual."""
        norms = self.norms.at[step % MEDIAN_WINDOW].set(jnp.where(jnp.isfinite(norm), norm, jnp.nan))
        consecutive = jnp.where(action == Action.NONFINITE, self.consecutive_nonfinite + 1, 0)
        new = GradGuardState(norms, consecutive, self.num_skipped + ~was_applied(action))
        return tree_where(action != Action.OFF, new, self)


def guarded(update: Callable[..., T]) -> Callable[..., tuple[T, GradGuardState, Metrics]]:
    """Wrap `update(state, grads)`: the gradient is scaled, or the state returned unchanged, as the guard decides."""

    def wrapped(
        state: T, grads: PyTree, *, loss: Array, step: Array, guard: GradGuardState, config: GradGuardConfig
    ) -> tuple[T, GradGuardState, Metrics]:
        # Decide from the loss and the gradient's norm, and record the step.
        grad_norm = global_norm(grads)
        action = guard.classify(config, loss, grad_norm)
        scale = guard.scale(config, action, grad_norm)
        new_guard = guard.update(action, grad_norm, step)

        # Update, or keep what was there.
        def apply(state: T) -> T:
            return update(state, jax.tree.map(lambda g: g * scale, grads))

        state = apply_if(was_applied(action), apply, state)
        metrics = {
            "optim/grad_norm": grad_norm,
            "guard/action": action,
            "guard/grad_norm_limit": guard.limit(config),
            "guard/consecutive_nonfinite": new_guard.consecutive_nonfinite,
            "guard/skipped_steps": new_guard.num_skipped,
        }
        return state, new_guard, metrics

    return wrapped


def was_applied(action: Int[Array, ""]) -> Bool[Array, ""]:
    """True if the step's update was applied."""
    return (action == Action.APPLIED) | (action == Action.CLIPPED)


def apply_if(condition: Bool[Array, ""], update: Callable[[T], T], old: T) -> T:
    """Return `update(old)` if the condition is true, else `old`.

    On a CPU by a branch: selecting every array would read the state once more, a tenth of a ViT-B step on few images.
    On other devices by selection, which is free there, while a branch would make the device wait for the host.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, update, lambda old: old, old)
    return tree_where(condition, update(old), old)


def compute_if(condition: Bool[Array, ""] | bool, compute: Callable[..., Metrics], *args: PyTree) -> Metrics:
    """Return `compute(*args)`; on a CPU NaN instead if the condition is false, to save the time."""
    if jax.default_backend() == "cpu":
        shapes = jax.eval_shape(compute, *args)
        skipped = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
        return jax.lax.cond(condition, compute, lambda *_: skipped, *args)
    return compute(*args)


def tree_where(condition: Bool[Array, ""], new: T, old: T) -> T:
    """`jnp.where` on every array of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
