"""The guard of a step: a loss or gradient that is not finite changes nothing, and a spike of the gradient is tamed.

What it remembers is part of the state, so a run that was interrupted judges as one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jepax.types import Metrics, UserError

T = TypeVar("T")
WINDOW, FEWEST = 128, 32
"""Gradient norms whose median is the usual one, and how many of them must be known before anything is a spike."""
OFF, FINE, CLIPPED, SKIPPED, ROLL_BACK, NOT_FINITE = -1, 0, 1, 2, 3, 4
"""Verdicts on a step; from `SKIPPED` on, and at `OFF`, which is after training has stopped, it changes nothing."""
NAMES = {CLIPPED: "clipped", SKIPPED: "skipped", ROLL_BACK: "rolled back", NOT_FINITE: "not finite"}
ACTIONS = {"off": FINE, "clip": CLIPPED, "skip": SKIPPED, "rollback": ROLL_BACK}


@dataclass(frozen=True)
class GuardConfig:
    """What becomes of steps that would harm the run."""

    patience: int = 10
    """Steps in a row whose loss or gradient is not finite (each changes nothing) until the run stops with a dump."""
    spike: Literal["off", "clip", "skip", "rollback"] = "clip"
    """What is done about a gradient spike: nothing; clip it to the limit; skip the step; go back to the newest
    checkpoint and take other examples from there on."""
    factor: float = 10.0
    """Limit of the gradient's norm, times the median of the last 128 steps' norms; above it is a spike."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"train.guard.patience={self.patience} must be at least 1")
        if self.factor <= 1:
            raise UserError(f"train.guard.factor={self.factor} must be above 1, the usual norm; try 10")


class Guard(eqx.Module):
    """What is remembered of the steps before."""

    norms: Float[Array, "window"]
    """Finite gradient norms of the newest steps, by step modulo window; not a number where there was none."""
    in_a_row: Int[Array, ""]
    """Steps up to now whose loss or gradient was not finite."""
    unused: Int[Array, ""]
    """Steps so far that changed nothing."""

    @staticmethod
    def new() -> "Guard":
        return Guard(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0), jnp.int32(0))

    def limit(self, config: GuardConfig) -> Float[Array, ""]:
        """Greatest usual norm; infinite while too few are known, or where spikes are let pass."""
        known = jnp.sum(jnp.isfinite(self.norms))
        usual = config.factor * jnp.nanmedian(self.norms)
        return jnp.where((known >= FEWEST) & (config.spike != "off"), usual, jnp.inf)

    def judge(self, config: GuardConfig, loss: Float[Array, ""], norm: Float[Array, ""]) -> Int[Array, ""]:
        """The verdict on a step of this loss and gradient norm."""
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        verdict = jnp.where(norm > self.limit(config), ACTIONS[config.spike], FINE)
        verdict = jnp.where(finite, verdict, NOT_FINITE)
        return jnp.where(self.in_a_row >= config.patience, OFF, verdict).astype(jnp.int32)

    def scale(self, config: GuardConfig, verdict: Int[Array, ""], norm: Float[Array, ""]) -> Float[Array, ""]:
        """What the gradient is multiplied by: 1, or limit / norm where it is clipped."""
        return jnp.where(verdict == CLIPPED, self.limit(config) / norm, 1.0)

    def after(self, verdict: Int[Array, ""], norm: Float[Array, ""], step: Int[Array, ""]) -> "Guard":
        """Spikes are remembered like every finite norm: a gradient that stays large soon counts as usual."""
        seen = self.norms.at[step % WINDOW].set(jnp.where(jnp.isfinite(norm), norm, jnp.nan))
        bad = verdict == NOT_FINITE
        in_a_row = jnp.where(bad, self.in_a_row + 1, 0)
        new = Guard(seen, in_a_row, self.unused + ~kept(verdict))
        return choose(verdict != OFF, new, self)


def kept(verdict: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the step's update is taken."""
    return (verdict == FINE) | (verdict == CLIPPED)


def only_if(condition: Bool[Array, ""], update: Callable[[T], T], old: T) -> T:
    """`update(old)` where the condition holds, and else `old`.

    On a CPU by a branch: a choice for every array would read the state once more, a tenth of a ViT-B step of few
    images. Elsewhere by choices, which cost nothing there, while a branch would let the device wait for the host.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(condition, update, lambda old: old, old)
    return choose(condition, update(old), old)


def measured(told: Bool[Array, ""], measure: Callable[..., Metrics], *given: PyTree) -> Metrics:
    """`measure(*given)`; on a CPU only where it is `told`, and else metrics that are not a number."""
    if jax.default_backend() == "cpu":
        shapes = jax.eval_shape(measure, *given)
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
        return jax.lax.cond(told, measure, lambda *_: nothing, *given)
    return measure(*given)


def choose(condition: Bool[Array, ""], new: T, old: T) -> T:
    """`new` where the condition holds and else `old`, array by array."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b) if eqx.is_array(a) else a, new, old)
