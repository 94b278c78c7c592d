"""Momentum schedule and update of an EMA teacher."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jepax import schedules
from jepax.errors import check_fields
from jepax.trees import EMA, cast, global_norm
from jepax.types import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class EMAConfig:
    """Momentum of a teacher: average <- momentum * average + (1 - momentum) * online."""

    start: float = 0.996
    """Momentum at the first step."""
    end: float = 1.0
    """Momentum at the last step."""
    schedule: schedules.ScheduleShape = "linear"
    """Schedule from start to end; constant stays at start."""
    schedule_stretch: float = 1.0
    """Length of the schedule over the length of the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's parameters. In bfloat16 it stalls: its updates are below that type's epsilon."""

    def __post_init__(self) -> None:
        check_fields("method.ema", self, "in [0, 1]", "start", "end")
        check_fields("method.ema", self, "above 0", "schedule_stretch")

    def at(self, step: Int[Array, ""] | int, total_steps: int) -> Float[Array, ""]:
        """Momentum applied after the update of `step`, counted from 0, in a run of `total_steps`."""
        # Above 1, the stretch makes the run end before its schedule does, as in the public I-JEPA.
        total = max(round(self.schedule_stretch * total_steps), 1)
        return schedules.ramp(self.schedule, step, start=self.start, final=self.end, total=total)


def init_ema(online: T, precision: str = "float32") -> EMA[T]:
    """Make a teacher equal to `online`, in the type `precision`."""
    # A copy, because the step donates its buffers, and none can be donated twice.
    return EMA(cast(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, online), precision))


def ema_update(teacher: EMA[T], online: T, momentum: Float[Array, ""]) -> tuple[EMA[T], Metrics]:
    """Move the teacher towards the online module; returns it and its metrics.

    - ema/relative_distance: |online - teacher| / |online| over all parameters, before the update;
    - ema/update_norm: |moved - teacher|, expected: ema/expected_update_norm = (1 - momentum) |online - teacher|.
    """
    # The two norms differ if the teacher stalls, as in bfloat16: the watchdog compares them.
    moved = teacher.update(online, momentum)
    distance = global_norm(_subtract_float32(online, teacher.average))
    return moved, {
        "ema/momentum": momentum,
        "ema/relative_distance": distance / global_norm(online),
        "ema/update_norm": global_norm(_subtract_float32(moved.average, teacher.average)),
        "ema/expected_update_norm": (1 - momentum) * distance,
    }


def _subtract_float32(a: T, b: T) -> T:
    """a - b over floating-point arrays, in float32."""
    # The difference of two close bfloat16 numbers may have no correct digit.
    return jax.tree.map(jnp.subtract, *(cast(eqx.filter(tree, eqx.is_inexact_array), jnp.float32) for tree in (a, b)))
