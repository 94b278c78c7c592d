"""The schedule of a teacher's momentum, and its move."""

from dataclasses import dataclass
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jepax import schedules
from jepax.trees import EMA, norm
from jepax.types import Metrics, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class MomentumConfig:
    """How slowly a teacher follows: average <- momentum * average + (1 - momentum) * online."""

    start: float = 0.996
    """Momentum of the first step."""
    final: float = 1.0
    """Momentum that the last step reaches."""
    shape: schedules.Shape = "linear"
    """Path from start to final; constant stays at start."""
    horizon: float = 1.0
    """Steps that the path takes, over the run's steps."""

    def __post_init__(self) -> None:
        for name in ("start", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"method.momentum.{name}={getattr(self, name)} is not in [0, 1]")
        if self.horizon <= 0:
            raise UserError(f"method.momentum.horizon={self.horizon} must be above 0; 1.0 is the run's length")

    def at(self, step: Int[Array, ""] | int, total_steps: int) -> Float[Array, ""]:
        """Momentum applied after the update of `step`, counted from 0, in a run of `total_steps`."""
        total = max(round(self.horizon * total_steps), 1)
        return schedules.ramp(self.shape, step, start=self.start, final=self.final, total=total)


def teacher_of(online: T) -> EMA[T]:
    """A teacher that starts equal; a copy, since buffers are donated to the step, and one cannot be donated twice."""
    return EMA(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, online))


def follow(teacher: EMA[T], online: T, momentum: Float[Array, ""]) -> tuple[EMA[T], Metrics]:
    """The teacher moved towards the online module, and what is logged of the move."""
    moved = teacher.towards(online, momentum)
    change = jax.tree.map(jnp.subtract, *(eqx.filter(t, eqx.is_inexact_array) for t in (moved, teacher)))
    return moved, {"momentum": momentum, "ema_step_norm": norm(change)}
