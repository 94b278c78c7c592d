"""Floors that an encoder must beat: the pixels themselves, and always naming the most frequent classes."""

import equinox as eqx
import jax
import numpy as np

from jepax.evals.feature_extractor import FeatureExtractor, ViewBatch
from jepax.evals.scoring import check_labels
from jepax.nn.vit import patchify
from jepax.types import Array, Float, Int
from jepax.views import CropConfig

MAX_SIDE = 32
"""Pixels; larger views are scaled down, so that the floor's features stay about as wide as an encoder's."""


class PixelFeatures(FeatureExtractor):
    """The view's pixels as features: all of them as one vector, or each patch's as a token."""

    crop: CropConfig = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)

    def pooled(self, view: ViewBatch) -> Float[Array, "1 batch dim"]:
        pixels = downscale(view)
        return pixels.reshape(1, len(pixels), -1)

    def tokens(self, view: ViewBatch) -> Float[Array, "batch patches dim"]:
        return patchify(view, self.patch_size)


def downscale(pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns channels"]:
    """Antialiased (triangle filter) to a longer side of `LARGEST_SIDE`, aspect kept; smaller ones stay as they are."""
    batch, height, width, channels = pixels.shape
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    shape = (batch, max(1, round(height * scale)), max(1, round(width * scale)), channels)
    return jax.image.resize(pixels, shape, "linear", antialias=True)


def majority_class(train: Int[np.ndarray, "n"], classes: int) -> Float[np.ndarray, "classes"]:
    """How often each class stands in training: the most frequent ones are what it always guesses; equals by number.

    **Raises** `UserError` if the split is empty or has a label out of range.
    """
    check_labels(train, classes, "train")
    return np.bincount(train, minlength=classes).astype(np.float32)
