"""What the rooms of the house hand each other: a batch of images, masks, metrics, and the error a user can mend."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from jepax.errors import UserError

AnyArray = jax.Array | np.ndarray
Metrics = dict[str, Array]
"""Named values of one step, on the device until they are logged."""


class ImageBatch(eqx.Module):
    """One batch as the host hands it over; each picture lies in its canvas's top left corner."""

    canvas: UInt8[AnyArray, "batch rows columns channels"]
    size: Int[AnyArray, "batch 2"]
    """Height and width of the picture inside its canvas, in pixels."""
    index: Int[AnyArray, "batch"]
    """Position in the run's order of examples, counted over all steps and hosts: seeds the example's key."""
    label: Int[AnyArray, "batch"] | None = None
    """Class, for probes only; no method's loss may read it."""


class Masks(eqx.Module):
    """Row-major patch indices of static size."""

    context: Int[Array, "batch context"]
    targets: Int[Array, "batch blocks target"]
    target_valid: Bool[Array, "batch blocks target"]
    """Marks the real entries of target blocks that are shorter than the largest one; they come first."""


__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "ImageBatch",
    "Int",
    "Masks",
    "Metrics",
    "PRNGKeyArray",
    "UserError",
]
