"""Changes of color, focus and tone, on the device: views with values in [0, 1], one key each, to such views.

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
    """Chances and strengths. The defaults change nothing; `PhotometricConfig(**LEJEPA)` is the public recipe's."""

    jitter_prob: float = 0.0
    """Chance that brightness, contrast, saturation and hue are jittered."""
    brightness: float = 0.4
    """The values are multiplied by a factor drawn from 1 - brightness to 1 + brightness."""
    contrast: float = 0.4
    """As brightness, for the distance from the view's mean gray."""
    saturation: float = 0.2
    """As brightness, for the distance from the pixel's own gray."""
    hue: float = 0.1
    """The hue turns by up to this share of the whole circle, at most 0.5."""
    grayscale_prob: float = 0.0
    """Chance that the view loses its color."""
    blur_prob: float = 0.0
    """Chance of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, in pixels of the view."""
    solarize_prob: float = 0.0
    """Chance that values of at least a half are inverted."""

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
"""Chances of LeJEPA's views (Balestriero & LeCun 2025, public recipe); the strengths are the defaults."""


def distort_color(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    """Jitter, gray, blur, solarize, in this order, each by its own chance; color is left alone on one channel.

    What has chance 0 is not computed. Differs from torchvision: the jitter's four parts have a fixed order.
    """
    names = ("jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
    draws = jnp.moveaxis(jax.vmap(lambda key: jr.split(key, (len(names), 2)))(keys), 0, 2)
    operations = {
        "jitter_prob": _random_jitter,
        "grayscale_prob": _random_grayscale,
        "blur_prob": _random_blur,
        "solarize_prob": _random_solarize,
    }
    for name, (key_chance, key_strength) in zip(names, draws, strict=True):
        if chance := getattr(config, name):
            taken = jax.vmap(lambda key, chance=chance: jr.bernoulli(key, chance))(key_chance)
            changed = operations[name](views, key_strength, config)
            views = jnp.where(taken[:, None, None, None], changed, views)
    return views


def to_grayscale(views: ViewBatch) -> Float[Array, "batch height width 1"]:
    """Luma, 0.299 R + 0.587 G + 0.114 B; the channel itself where there is one."""
    return views if views.shape[-1] == 1 else jnp.sum(views * jnp.asarray(_LUMA), axis=-1, keepdims=True)


def blend(views: ViewBatch, other: Array, factor: Float[Array, "batch"]) -> ViewBatch:
    """factor * view + (1 - factor) * other, cut to [0, 1]: torchvision's rule for brightness, contrast, saturation."""
    factor = factor[:, None, None, None]
    return jnp.clip(factor * views + (1 - factor) * other, 0, 1)


def adjust_hue(views: Float[Array, "batch height width 3"], turn: Float[Array, "batch"]) -> ViewBatch:
    """The hue turned by a share of the circle; value and saturation stay, by way of HSV (Smith 1978).

    Channels are compared with each other, never for being equal to their maximum: compilers compute a value twice where
    that spares memory, and may round it differently.
    """
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

    def channel(offset: int) -> Array:
        place = jnp.mod(offset + sixths, 6)
        return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def gaussian_blur(views: ViewBatch, sigma: Float[Array, "batch"], reach: int) -> ViewBatch:
    """A Gaussian of `sigma` pixels, cut at `reach` pixels to either side, mirrored at the borders (edges once)."""
    offsets = jnp.arange(-reach, reach + 1)
    weights = jnp.exp(-jnp.square(offsets / sigma[:, None]) / 2)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
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
    reach = min(int(3 * high + 0.5), min(views.shape[1:3]) - 1)
    return gaussian_blur(views, sigma, reach)


def _random_solarize(views: ViewBatch, keys: Key[Array, "batch"], config: ColorConfig) -> ViewBatch:
    return jnp.where(views >= 0.5, 1 - views, views)
