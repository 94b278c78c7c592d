"""Color jitter, grayscale, blur and solarization on the device: views in [0, 1] and one key each, to views in [0, 1].

Source: the augmentations of SimCLR (Chen et al. 2020, appendix A) and BYOL (Grill et al. 2020, appendix B), with the
operations as torchvision and Pillow define them.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jepax.errors import check_fields
from jepax.types import UserError

ViewBatch = Float[Array, "batch height width channels"]
Keys = Key[Array, "batch"]
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's conversion to L


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
        check_fields("color", self, "in [0, 1]", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
        check_fields("color", self, "in [0, 1]", "brightness", "contrast", "saturation")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"color.hue={self.hue} must be in [0, 0.5]")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UserError(f"color.blur_sigma={self.blur_sigma} is not a range above 0; try (0.1, 2.0)")


LEJEPA_COLOR = {"jitter_prob": 0.8, "grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
"""Probabilities of LeJEPA's views (Balestriero & LeCun 2025, public recipe); the strengths are the defaults."""


def distort_color(views: ViewBatch, keys: Keys, config: ColorConfig) -> ViewBatch:
    """Apply jitter, grayscale, blur and solarization in this order, each with its own probability.

    Operations with probability 0 are not computed; one-channel views skip saturation and hue.
    Differs from torchvision: the jitter's four parts have a fixed order.
    """
    operations = {
        "jitter_prob": _random_jitter,
        "grayscale_prob": _grayscale,
        "blur_prob": _random_blur,
        "solarize_prob": _solarize,
    }
    # Two keys per operation and view: one for the chance, one for the strength. (operations, 2, batch)
    draws = jnp.moveaxis(jax.vmap(lambda key: jr.split(key, (len(operations), 2)))(keys), 0, 2)
    # Every view is distorted and the draw selects: shapes stay static under `jit`.
    for (name, operation), (key_chance, key_strength) in zip(operations.items(), draws, strict=True):
        if probability := getattr(config, name):
            is_distorted = jax.vmap(lambda key, p=probability: jr.bernoulli(key, p))(key_chance)
            views = jnp.where(is_distorted[:, None, None, None], operation(views, key_strength, config), views)
    return views


def to_grayscale(views: ViewBatch) -> Float[Array, "batch height width 1"]:
    """Luma, 0.299 R + 0.587 G + 0.114 B; a single channel is returned unchanged."""
    return views if views.shape[-1] == 1 else jnp.sum(views * jnp.asarray(LUMA), axis=-1, keepdims=True)


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
    divisor = jnp.where(chroma > 0, chroma, 1)
    red_largest, green_largest = (red >= green) & (red >= blue), green >= blue
    others = jnp.where(green_largest, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = jnp.where(red_largest, (green - blue) / divisor, others) + 6 * turn[:, None, None]

    # HSV to RGB: each channel is a trapezoid in the hue, with an offset of its own.
    def channel(offset: int) -> Array:
        hue = jnp.mod(offset + sixths, 6)
        return value - chroma * jnp.clip(jnp.minimum(hue, 4 - hue), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def gaussian_blur(views: ViewBatch, sigma: Float[Array, "batch"], radius: int) -> ViewBatch:
    """Gaussian blur of `sigma` pixels, truncated at `radius` pixels on either side; borders reflect (edges once)."""
    # (batch, 2 radius + 1): one kernel per view, of sum 1.
    offsets = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-jnp.square(offsets / sigma[:, None]) / 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    # Separable: rows, then columns. A sum of shifted copies needs no convolution with a kernel per view.
    for axis in (1, 2):
        pads = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(views, pads, mode="reflect"), views.shape[axis]
        shifted = (jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * radius + 1))
        views = sum(weights[:, k, None, None, None] * part for k, part in enumerate(shifted))
    return views


def _uniform(keys: Keys, low: float, high: float) -> Float[Array, "batch"]:
    return jax.vmap(lambda key: jr.uniform(key, minval=low, maxval=high))(keys)


def _random_jitter(views: ViewBatch, keys: Keys, config: ColorConfig) -> ViewBatch:
    keys = jnp.moveaxis(jax.vmap(lambda key: jr.split(key, 4))(keys), 1, 0)
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    brightness, contrast, saturation, hue = (
        _uniform(k, 1 - strength, 1 + strength) for k, strength in zip(keys, strengths, strict=True)
    )
    # Brightness blends with black, contrast with the mean gray, saturation with the pixel's own gray.
    views = blend(views, jnp.zeros(()), brightness)
    views = blend(views, jnp.mean(to_grayscale(views), axis=(1, 2), keepdims=True), contrast)
    return views if views.shape[-1] == 1 else adjust_hue(blend(views, to_grayscale(views), saturation), hue - 1)


def _grayscale(views: ViewBatch, keys: Keys, config: ColorConfig) -> ViewBatch:
    return jnp.broadcast_to(to_grayscale(views), views.shape)


def _random_blur(views: ViewBatch, keys: Keys, config: ColorConfig) -> ViewBatch:
    # A radius static for all draws: 3 deviations of the widest blur, as far as the view allows reflection.
    low, high = config.blur_sigma
    radius = min(int(3 * high + 0.5), min(views.shape[1:3]) - 1)
    return gaussian_blur(views, _uniform(keys, low, high), radius)


def _solarize(views: ViewBatch, keys: Keys, config: ColorConfig) -> ViewBatch:
    return jnp.where(views >= 0.5, 1 - views, views)
