"""Crops on the device: a canvas, a box and a key give one view, with static shapes, inside `jit`.

An antialiased resize of one image is two matrix products, view = R X C^T: row i of R contains the weights of the
image's rows in the view's row i, and C the same for columns. The weights are Pillow's: a kernel k around the
output pixel's center, widened by the reduction s = max(1, box / output), zero outside the limits, and of sum one:

    R[i, y] ~ k((y + 1/2 - top - (i + 1/2) height / output) / s)

Source: Pillow, src/libImaging/Resample.c (resize); torchvision, transforms.RandomResizedCrop and CenterCrop (boxes).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Real, UInt8

from jepax.types import AnyArray, ImageBatch, UserError

Interpolation = Literal["bilinear", "bicubic"]
ViewBatch = Float[Array, "batch height width channels"]
Pixels = Float[Array, "*batch height width channels"]
NUM_ATTEMPTS = 10
"""Random boxes drawn per image; the first that fits is used (torchvision's number)."""


@dataclass(frozen=True)
class CropConfig:
    """Crop, resize and normalization. The defaults are those of I-JEPA's public ImageNet runs (src/transforms.py)."""

    size: tuple[int, int] = (224, 224)
    """Height and width of the view, in pixels."""
    scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of a random crop, drawn log-uniformly."""
    interpolation: Interpolation = "bilinear"
    """Kernel of the antialiased resize, as Pillow defines it."""
    hflip_prob: float = 0.0
    """Probability of a horizontal flip."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the pixel values in [0, 1], one per channel; ImageNet's by default."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixel values in [0, 1], one per channel; ImageNet's by default."""
    eval_resize_ratio: float = 256 / 224
    """Evaluation: the image is resized to cover size * eval_resize_ratio, then center-cropped to size."""

    def __post_init__(self) -> None:
        """Raise `UserError` at the first field with an invalid value."""
        self._require("size", len(self.size) == 2 and min(self.size) >= 1, "two positive sides; try (224, 224)")
        self._require("scale", _is_range(self.scale) and self.scale[1] <= 1, "0 < low <= high <= 1; try (0.3, 1.0)")
        self._require("ratio", _is_range(self.ratio), "0 < low <= high; try (0.75, 1.3333)")
        self._require("interpolation", self.interpolation in ("bilinear", "bicubic"), "bilinear or bicubic")
        self._require("hflip_prob", 0 <= self.hflip_prob <= 1, "a probability between 0 and 1; try 0.5")
        self._require("mean", len(self.mean) >= 1 and all(map(math.isfinite, self.mean)), "one number per channel")
        self._require("std", all(0 < s < math.inf for s in self.std), "positive numbers, one per channel")
        self._require("std", len(self.std) == len(self.mean), f"as many numbers as crop.mean={self.mean}")
        self._require("eval_resize_ratio", 1 <= self.eval_resize_ratio < math.inf, "at least 1; 1 cuts nothing off")

    def _require(self, field: str, is_valid: bool, need: str) -> None:
        if not is_valid:
            raise UserError(f"crop.{field}={getattr(self, field)!r} does not work: it needs {need}")

    def tiny(self) -> "CropConfig":
        """The same crop at 24 x 24 pixels, for tests."""
        return replace(self, size=(24, 24))


def _is_range(pair: tuple[float, ...]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf


# ---- Views: each depends on its image and key only. `normalize` raises `UserError` at a wrong number of channels. ----


def random_resized_crop(images: ImageBatch, keys: Key[Array, "batch"], config: CropConfig) -> ViewBatch:
    """Resize a random box of each image, flip it at random and normalize it."""
    return normalize(random_crop_unnormalized(images, keys, config), config)


def random_crop_unnormalized(images: ImageBatch, keys: Key[Array, "batch"], config: CropConfig) -> ViewBatch:
    """`random_resized_crop` without the normalization: values in [0, 1]."""
    # Two keys per image, (batch, 2) -> (2, batch). The flip has its own: changing `hflip_prob` does not move the boxes.
    key_box, key_flip = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
    box = sample_boxes(key_box, images.size, config)
    flip = jax.vmap(lambda key: jr.bernoulli(key, config.hflip_prob))(key_flip)
    return resize_crop(images.canvas, box, config.size, config.interpolation, flip=flip)


def center_crop(images: ImageBatch, config: CropConfig) -> ViewBatch:
    """The view for evaluation: resize to cover size * eval_resize_ratio, center-crop to size, normalize.

    With a square size the shorter side becomes size * eval_resize_ratio, and of an odd margin the smaller half is cut
    at the top or left, as transformers' image processors do; torchvision's CenterCrop rounds that half to even.
    """
    # One resample does both steps. Its limits are the full image: pixels outside the crop contribute to its border.
    size = jnp.asarray(images.size, jnp.int32)
    limits = jnp.concatenate([jnp.zeros_like(size), size], axis=1)
    box = _center_boxes(size, config)
    return normalize(resize_crop(images.canvas, box, config.size, config.interpolation, limits=limits), config)


def normalize(pixels: Pixels, config: CropConfig) -> Pixels:
    """(pixels - mean) / std for pixel values in [0, 1]."""
    mean, std = _mean_and_std(pixels, config)
    return (pixels - mean) / std


def denormalize(view: Pixels, config: CropConfig) -> Pixels:
    """Pixel values of a normalized view, clipped to [0, 1], for figures."""
    mean, std = _mean_and_std(view, config)
    return jnp.clip(view * std + mean, 0, 1)


def _mean_and_std(pixels: Array, config: CropConfig) -> tuple[Array, Array]:
    channels = pixels.shape[-1]
    if channels != len(config.mean):
        raise UserError(
            f"crop.mean={config.mean} and crop.std={config.std} have {len(config.mean)} value(s), "
            f"the images {channels} channel(s); give one per channel"
        )
    return jnp.asarray(config.mean, pixels.dtype), jnp.asarray(config.std, pixels.dtype)


# ---- Boxes: (top, left, height, width) in pixels of the image, whose size is (height, width). ----


def sample_boxes(
    keys: Key[Array, "batch"], size: Int[AnyArray, "batch 2"], config: CropConfig
) -> Int[Array, "batch 4"]:
    """One random box per image: area uniform in `config.scale`, ratio log-uniform, position uniform."""
    return jax.vmap(lambda key, size: _sample_box(key, size, config))(keys, jnp.asarray(size, jnp.int32))


def _sample_box(key: PRNGKeyArray, size: Int[Array, "2"], config: CropConfig) -> Int[Array, "4"]:
    """The first of ten draws that fits the image, else the largest central box of an allowed ratio."""
    # All ten shapes are drawn together, so that no loop's length depends on the draws. (attempts, 2)
    key_area, key_ratio, key_position = jr.split(key, 3)
    low, high = (math.log(ratio) for ratio in config.ratio)
    area = jnp.prod(size) * jr.uniform(key_area, (NUM_ATTEMPTS,), minval=config.scale[0], maxval=config.scale[1])
    ratio = jnp.exp(jr.uniform(key_ratio, (NUM_ATTEMPTS,), minval=low, maxval=high))
    shapes = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1))).astype(size.dtype)
    fits = jnp.all((shapes > 0) & (shapes <= size), axis=1)
    shape = shapes[jnp.argmax(fits)]

    # If no draw fits, `shape` may exceed the image; its position is then not used.
    position = jr.randint(key_position, (2,), 0, jnp.maximum(size - shape, 0) + 1, dtype=size.dtype)

    # The fallback: the full image, its longer side shortened to an allowed ratio.
    tallest, widest = size[1] / config.ratio[0], size[0] * config.ratio[1]
    central = jnp.maximum(1, jnp.minimum(size, jnp.round(jnp.stack([tallest, widest])).astype(size.dtype)))
    fallback = jnp.concatenate([(size - central) // 2, central])
    return jnp.where(jnp.any(fits), jnp.concatenate([position, shape]), fallback)


def _center_boxes(size: Int[Array, "batch 2"], config: CropConfig) -> Float[Array, "batch 4"]:
    """The center crop's box, in fractions of pixels."""
    cover = jnp.asarray([round(side * config.eval_resize_ratio) for side in config.size], size.dtype)
    # The limiting side is resized to cover exactly, the other in proportion, rounded down as in torchvision's Resize.
    height_limits = size[:, 0] * cover[1] <= size[:, 1] * cover[0]
    is_limiting = jnp.stack([height_limits, ~height_limits], axis=1)
    resized = jnp.where(is_limiting, cover, (size * cover[::-1]) // size[:, ::-1])
    # The crop is centered in the resized image, then converted back to pixels of the original.
    start = (resized - jnp.asarray(config.size)) // 2
    pixels = size / resized
    return jnp.concatenate([start * pixels, jnp.asarray(config.size) * pixels], axis=1)


# ---- Resize ----


def resize_crop(
    canvas: UInt8[AnyArray, "batch rows columns channels"],
    box: Real[Array, "batch 4"],
    size: tuple[int, int],
    interpolation: Interpolation,
    *,
    flip: Bool[Array, "batch"] | None = None,
    limits: Real[Array, "batch 4"] | None = None,
) -> Float[Array, "batch {size[0]} {size[1]} channels"]:
    """Resize each canvas's box, in pixels or fractions of them, to `size`; values in [0, 1].

    Only pixels that `limits` touches are read. By default the limits are the box, which equals crop-then-resize; a
    larger box, inside the canvas, equals resize-then-crop. `flip` mirrors left and right.

    Bicubic weights overshoot, so each pass is clipped, as in Pillow. Differs from Pillow: no rounding to integers;
    bicubic always resizes the columns first, while Pillow from 13 on resizes the rows first if the height shrinks more.
    """
    limits = box if limits is None else limits

    # One weight matrix per image and axis: R and C of this file's first lines. `0::2` is (top, height), `1::2` (left,
    # width). A flip reverses the matrix of the columns, not the pixels.
    rows, columns = canvas.shape[1:3]
    row_weights = _resize_weights(box[:, 0::2], limits[:, 0::2], rows, size[0], interpolation)
    column_weights = _resize_weights(box[:, 1::2], limits[:, 1::2], columns, size[1], interpolation)
    if flip is not None:
        column_weights = jnp.where(flip[:, None, None], column_weights[:, ::-1], column_weights)

    # The clip between passes makes bicubic's order matter: columns first, as in Pillow. Else the order with fewer
    # multiplications. In the products, o and p are rows and columns of the view; r, y and x those that come in.
    (height, width), passes = size, [("bor,brxc->boxc", row_weights), ("bpx,byxc->bypc", column_weights)]
    if interpolation == "bicubic" or width * rows * (columns + height) < height * columns * (rows + width):
        passes.reverse()

    # Integers up to 255 are exact in every matrix format an accelerator may choose, so the division comes last.
    pixels = jnp.asarray(canvas, jnp.float32)
    for product, weights in passes:
        pixels = jnp.clip(jnp.einsum(product, weights, pixels), 0, 255)
    return pixels / 255


def _resize_weights(
    span: Real[Array, "batch 2"], limits: Real[Array, "batch 2"], pixels: int, out: int, interpolation: Interpolation
) -> Float[Array, "batch out pixels"]:
    """Weight of each input pixel in each output pixel along one axis; spans are (start, length). Rows sum to one."""
    start, length = (side[:, None, None].astype(jnp.float32) for side in span.T)
    first, extent = (side[:, None, None].astype(jnp.float32) for side in limits.T)

    # Distance from each input pixel to each output pixel's center, over the reduction s: the module's formula.
    step = length / out
    pixel = jnp.arange(pixels, dtype=jnp.float32)
    center = start + (jnp.arange(out, dtype=jnp.float32)[:, None] + 0.5) * step
    distance = jnp.abs(pixel + 0.5 - center) / jnp.maximum(step, 1)

    # Weights outside the limits are zero; the others are normalized, so a flat image stays flat.
    is_inside = (pixel + 1 > first) & (pixel < first + extent)
    kernel = jnp.maximum(0, 1 - distance) if interpolation == "bilinear" else _cubic_kernel(distance)
    weights = jnp.where(is_inside, kernel, 0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def _cubic_kernel(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Keys' cubic, a = -1/2, x >= 0: 3/2 x^3 - 5/2 x^2 + 1 below 1, -1/2 (x^3 - 5 x^2 + 8 x - 4) below 2."""
    near = (1.5 * x - 2.5) * x**2 + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
