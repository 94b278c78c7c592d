"""Floors that an encoder must beat: the pixels themselves, and always naming the most frequent classes."""

from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np

from jepax.evals.features import Scores, check_labels, scores
from jepax.types import Array, Float, Images, Int

LARGEST_SIDE = 32
"""Pixels; larger views are scaled down, so that the floor's features stay about as wide as an encoder's."""


class RawPixels(eqx.Module):
    """The centre view's pixels as features, to be given to `extract` in an encoder's place."""

    view: Callable[[Images], Float[Array, "batch height width channels"]]
    """The deterministic view that the encoders are evaluated on."""

    def __call__(self, images: Images) -> Float[Array, "1 batch dim"]:
        pixels = shrink(self.view(images))
        return pixels.reshape(1, len(pixels), -1)


def shrink(pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns channels"]:
    """Antialiased (triangle filter) to a longer side of `LARGEST_SIDE`, aspect kept; smaller ones stay as they are."""
    batch, height, width, channels = pixels.shape
    scale = LARGEST_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    shape = (batch, max(1, round(height * scale)), max(1, round(width * scale)), channels)
    return jax.image.resize(pixels, shape, "linear", antialias=True)


def majority_class(train: Int[np.ndarray, "n"], test: Int[np.ndarray, "m"], classes: int) -> Scores:
    """Test accuracy, in percent, of always naming the classes most frequent in training; equals by class number.

    **Raises** `UserError` if a split is empty or has a label out of range.
    """
    check_labels(train, classes, "train")
    check_labels(test, classes, "test")
    by_frequency = np.argsort(-np.bincount(train, minlength=classes), kind="stable")
    return scores(np.argsort(by_frequency)[test])
