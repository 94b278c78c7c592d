"""Types shared by all modules: image batches, masks, metrics, and `UserError`."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from jepax.errors import UserError

AnyArray = jax.Array | np.ndarray
Metrics = dict[str, Array]
"""Named values of one step, on the device until they are logged."""


class ImageBatch(eqx.Module):
    """One batch from the host; each image is in its canvas's top left corner."""

    canvas: UInt8[AnyArray, "batch rows columns channels"]
    size: Int[AnyArray, "batch 2"]
    """Height and width of the image inside its canvas, in pixels."""
    index: Int[AnyArray, "batch"]
    """Position in the run's order of examples, over all steps and hosts; seeds the example's key."""
    label: Int[AnyArray, "batch"] | None = None
    """Class, for probes only; no method's loss reads it."""


class ClipBatch(eqx.Module):
    """One batch of short videos from the host, with what was done between their frames."""

    frames: UInt8[AnyArray, "batch clip height width channels"]
    actions: Float[AnyArray, "batch clip action"]
    """The block of actions that leaves each frame, side by side, each number normalized by the data's mean and
    standard deviation."""
    index: Int[AnyArray, "batch"]
    """As in `ImageBatch`."""


class Masks(eqx.Module):
    """Row-major patch indices of static size."""

    context: Int[Array, "batch context"]
    targets: Int[Array, "batch blocks target"]
    target_valid: Bool[Array, "batch blocks target"]
    """True for the valid entries of each target block, which come first; blocks are padded to the largest."""


class MaskedViews(eqx.Module):
    """One view of each image, and the indices of its context and target patches."""

    image: Float[Array, "batch height width channels"]
    masks: Masks


__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "ClipBatch",
    "Float",
    "ImageBatch",
    "Int",
    "MaskedViews",
    "Masks",
    "Metrics",
    "PRNGKeyArray",
    "UserError",
]
