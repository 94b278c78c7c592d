"""Baselines that an encoder must beat: raw pixels, and always predicting the most frequent classes."""

import equinox as eqx
import jax
import numpy as np

from jepax.evals.checks import check_labels
from jepax.evals.feature_extractor import FeatureExtractor, View
from jepax.nn.vit import patchify
from jepax.types import Array, Float, Int
from jepax.views import CropConfig

MAX_SIDE = 32
"""Pixels. Larger views are downscaled, so that pixel features are about as wide as an encoder's."""


class PixelFeatures(FeatureExtractor):
    """The view's pixels as features: all of them as one vector, or each patch's as a token."""

    crop: CropConfig = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)

    def pooled(self, view: View) -> Float[Array, "1 batch dim"]:
        pixels = downscale(view)
        return pixels.reshape(1, len(pixels), -1)

    def tokens(self, view: View) -> Float[Array, "batch patches dim"]:
        return patchify(view, self.patch_size)


def downscale(pixels: View) -> Float[Array, "batch rows columns channels"]:
    """Resizes to a longer side of `MAX_SIDE`, antialiased (triangle filter), with the aspect ratio kept.

    Smaller views are returned unchanged.
    """
    batch, height, width, channels = pixels.shape
    scale = MAX_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    shape = (batch, max(1, round(height * scale)), max(1, round(width * scale)), channels)
    return jax.image.resize(pixels, shape, "linear", antialias=True)


def class_counts(train: Int[np.ndarray, "n"], classes: int) -> Float[np.ndarray, "classes"]:
    """Training examples of each class: the majority baseline predicts the most frequent ones, ties by class number.

    **Raises** `UserError` if the split is empty or has a label out of range.
    """
    check_labels(train, classes, "train")
    return np.bincount(train, minlength=classes).astype(np.float32)
