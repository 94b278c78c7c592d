"""Color jitter, grayscale, blur and solarization on the device: views in [0, 1] and one key each, to views in [0, 1].

Source: the augmentations of SimCLR (Chen et al. 2020, appendix A) and BYOL (Grill et al. 2020, appendix B), with the
operations as torchvision and Pillow define them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jepax.types import UserError

ViewBatch = Float[Array, "batch height width channels"]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's conversion to L


@dataclass(frozen=True)
class ColorConfig:
    """Probabilities and strengths. The defaults change nothing; `ColorConfig(**LEJEPA_COLOR)` is the public recipe."""

    jitter_prob: float = 0.0
    """Probability of jittering brightness, contrast, saturation and hue."""
    brightness: float = 0.4
    """Strength: the values are multiplied by a factor uniform in [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """Strength, as brightness, on the distance to the view's mean gray."""
    saturation: float = 0.2
    """Strength, as brightness, on the distance to the pixel's own gray."""
    hue: float = 0.1
    """Strength: largest hue rotation, as a fraction of the circle; at most 0.5."""
    grayscale_prob: float = 0.0
    """Probability of converting the view to gray."""
    blur_prob: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize_prob: float = 0.0
    """Probability of inverting the values at or above 0.5."""

    def __post_init__(self) -> None:
        for name in (
            "jitter_prob",
            "grayscale_prob",
            "blur_prob",
            "solarize_prob",
            "brightness",
            "contrast",
            "saturation",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"color.{name}={getattr(self, name)} is not in [0, 1]")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"color.hue={self.hue} is not in [0, 0.5]")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UserError(f"color.blur_sigma={self.blur_sigma} is not a range above 0; try (0.1, 2.0)")


LEJEPA_COLOR = {"jitter_prob": 0.8, "grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
"""Probabilities of LeJEPA's views (Balestriero & LeCun 2025, public recipe); the strengths are the defaults."""


def distort_color(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    """Apply jitter, grayscale, blur and solarization in this order, each with its own probability.

    Operations with probability 0 are not computed; one-channel views skip saturation and hue.
    Differs from torchvision: the jitter's four parts have a fixed order.
    """
    # Two keys per operation and view: does it apply, and how strongly. (operations, 2, batch)
    names = ("jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
    draws = jnp.moveaxis(jax.vmap(lambda key: jr.split(key, (len(names), 2)))(keys), 0, 2)
    operations = {
        "jitter_prob": _random_jitter,
        "grayscale_prob": _random_grayscale,
        "blur_prob": _random_blur,
        "solarize_prob": _random_solarize,
    }
    # Every view is distorted and the draw selects: shapes stay static under `jit`.
    for name, (key_chance, key_strength) in zip(names, draws, strict=True):
        if chance := getattr(config, name):
            taken = jax.vmap(lambda key, chance=chance: jr.bernoulli(key, chance))(key_chance)
            changed = operations[name](views, key_strength, config)
            views = jnp.where(taken[:, None, None, None], changed, views)
    return views


def to_grayscale(views: ViewBatch) -> Float[Array, "batch height width 1"]:
    """Luma, 0.299 R + 0.587 G + 0.114 B; a single channel is returned unchanged."""
    return views if views.shape[-1] == 1 else jnp.sum(views * jnp.asarray(_LUMA), axis=-1, keepdims=True)


def blend(views: ViewBatch, other: Array, factor: Float[Array, "batch"]) -> ViewBatch:
    """factor * view + (1 - factor) * other, clipped to [0, 1]: torchvision's brightness, contrast, saturation."""
    factor = factor[:, None, None, None]
    return jnp.clip(factor * views + (1 - factor) * other, 0, 1)


def adjust_hue(views: Float[Array, "batch height width 3"], turn: Float[Array, "batch"]) -> ViewBatch:
    """Rotate the hue by a fraction of the circle in HSV (Smith 1978); value and saturation do not change.

    Channels are compared with each other, never tested for equality with their maximum: a compiler may compute a value
    twice to save memory and round it differently.
    """
    # RGB to HSV: value, chroma, and the hue in sixths of the circle. Gray pixels divide by 1 instead of 0.
    value, least = jnp.max(views, axis=-1), jnp.min(views, axis=-1)
    chroma = value - least
    red, green, blue = jnp.moveaxis(views, -1, 0)
    safe = jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turn[:, None, None]

    # HSV to RGB: each channel is a trapezoid in the hue, with an offset of its own.
    def channel(offset: int) -> Array:
        place = jnp.mod(offset + sixths, 6)
        return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def gaussian_blur(views: ViewBatch, sigma: Float[Array, "batch"], reach: int) -> ViewBatch:
    """Gaussian blur of `sigma` pixels, truncated at `reach` pixels on either side; borders reflect (edges once)."""
    # (batch, 2 reach + 1): one kernel per view, of sum 1.
    offsets = jnp.arange(-reach, reach + 1)
    weights = jnp.exp(-jnp.square(offsets / sigma[:, None]) / 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    # Separable: rows, then columns. A sum of shifted copies needs no convolution with a kernel per view.
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (reach, reach)
        padded, size = jnp.pad(views, pads, mode="reflect"), views.shape[axis]
        shifted = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * reach + 1))
        views = sum(weights[:, k, None, None, None] * part for k, part in enumerate(shifted))
    return views


def _random_jitter(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    key = jnp.moveaxis(jax.vmap(lambda k: jr.split(k, 4))(keys), 1, 0)

    def factors(keys: Key[Array, "batch"], strength: float) -> Float[Array, "batch"]:
        return jax.vmap(lambda k: jr.uniform(k, minval=1 - strength, maxval=1 + strength))(keys)

    # Brightness blends with black, contrast with the mean gray, saturation with the pixel's own gray.
    views = blend(views, jnp.zeros(()), factors(key[0], config.brightness))
    views = blend(views, jnp.mean(to_grayscale(views), axis=(1, 2), keepdims=True), factors(key[1], config.contrast))
    if views.shape[-1] == 1:
        return views
    views = blend(views, to_grayscale(views), factors(key[2], config.saturation))
    return adjust_hue(views, factors(key[3], config.hue) - 1)


def _random_grayscale(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    return jnp.broadcast_to(to_grayscale(views), views.shape)


def _random_blur(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    low, high = config.blur_sigma
    sigma = jax.vmap(lambda key: jr.uniform(key, minval=low, maxval=high))(keys)
    # Static for all draws: 3 deviations of the widest blur, as far as the view allows reflection.
    reach = min(int(3 * high + 0.5), min(views.shape[1:3]) - 1)
    return gaussian_blur(views, sigma, reach)


def _random_solarize(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    return jnp.where(views >= 0.5, 1 - views, views)
