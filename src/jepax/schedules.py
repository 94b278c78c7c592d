"""Schedules over the steps of a run: functions of the step, a number or, under `jit`, an array."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

StepLike = int | float | Int[Array, ""] | Float[Array, ""]
ScheduleShape = Literal["constant", "linear", "cosine"]


def ramp(shape: ScheduleShape, step: StepLike, *, start: float, final: float, total: int) -> Float[Array, ""]:
    """From `start` at step 0 to `final` at step `total` and after it; `constant` stays at `start`."""
    fraction = jnp.clip(jnp.asarray(step, float) / total, 0.0, 1.0)
    if shape == "constant":
        return jnp.asarray(start, fraction.dtype)
    if shape == "linear":
        return start + (final - start) * fraction
    return final + (start - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))


def warmup_cosine(
    step: StepLike, *, start: float, peak: float, final: float, warmup: int, total: int
) -> Float[Array, ""]:
    """Linear from `start` at step 0 to `peak` at step `warmup`, then a cosine to `final` at step `total`.

    Source: the learning rate of I-JEPA, Assran et al. 2023, appendix A.
    """
    step = jnp.asarray(step, float)
    rise = ramp("linear", step, start=start, final=peak, total=max(warmup, 1))
    fall = ramp("cosine", step - warmup, start=peak, final=final, total=max(total - warmup, 1))
    return jnp.where(step < warmup, rise, fall)
