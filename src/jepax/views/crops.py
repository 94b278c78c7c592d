"""Crops on the device: a canvas, a box and a key give one view, with static shapes, inside `jit`.

An antialiased resize of one image is two matrix products, view = R X C^T: row i of R contains the weights of the
image's rows in the view's row i, and C the same for columns. The weights are Pillow's: a kernel k around the
output pixel's center, widened by the reduction s = max(1, box / output), zero outside the limits, and of sum one:

    R[i, y] ~ k((y + 1/2 - top - (i + 1/2) height / output) / s)

Source: Pillow, src/libImaging/Resample.c (resize); torchvision, transforms.RandomResizedCrop and CenterCrop (boxes).
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Real, UInt8

from jepax.types import AnyArray, ImageBatch, UserError

Interpolation = Literal["bilinear", "bicubic"]
_NUM_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
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
        self._require("hflip_prob", 0 <= self.hflip_prob <= 1, "a chance between 0 and 1; try 0.5")
        self._require("mean", len(self.mean) >= 1 and all(map(math.isfinite, self.mean)), "one number per channel")
        self._require("std", all(0 < s < math.inf for s in self.std), "positive numbers, one per channel")
        self._require("std", len(self.std) == len(self.mean), f"as many numbers as crop.mean={self.mean}")
        self._require("eval_resize_ratio", 1 <= self.eval_resize_ratio < math.inf, "at least 1; 1 cuts nothing off")

    def tiny(self) -> "CropConfig":
        """The same crop at 24 x 24 pixels, for tests."""
        return dataclasses.replace(self, size=(24, 24))

    def _require(self, field: str, holds: bool, need: str) -> None:
        if not holds:
            raise UserError(f"crop.{field}={getattr(self, field)!r} does not work: it needs {need}")


def random_resized_crop(
    images: ImageBatch, keys: Key[Array, "batch"], config: CropConfig
) -> Float[Array, "batch height width channels"]:
    """Resize a random box of each image, flip it at random and normalize it; depends on image and key only.

    Raises `UserError` if the number of channels is not that of the config's mean and std.
    """
    return normalize(random_crop_unnormalized(images, keys, config), config)


def random_crop_unnormalized(
    images: ImageBatch, keys: Key[Array, "batch"], config: CropConfig
) -> Float[Array, "batch height width channels"]:
    """`random_resized_crop` without the normalization: values in [0, 1]."""
    # The flip has a key of its own, so changing `hflip_prob` does not move the boxes.
    key_box, key_flip = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
    box = sample_boxes(key_box, images.size, config)
    flip = jax.vmap(lambda key: jr.bernoulli(key, config.hflip_prob))(key_flip)
    return resize_crop(images.canvas, box, config.size, config.interpolation, flip=flip)


def center_crop(images: ImageBatch, config: CropConfig) -> Float[Array, "batch height width channels"]:
    """The view for evaluation: resize to cover size * eval_resize_ratio, center-crop to size, normalize.

    With a square size the shorter side becomes size * eval_resize_ratio, and of an odd margin the smaller half is cut
    at the top or left, as transformers' image processors do; torchvision's CenterCrop rounds that half to even. One
    resample does both steps: its weights may reach past the crop, to the image's edges, as in resize-then-crop.
    Raises `UserError` if the number of channels is not that of the config's mean and std.
    """
    # The limits are the full image: pixels outside the crop contribute to its border.
    picture = jnp.asarray(images.size, jnp.int32)
    box = _center_boxes(picture, config)
    limits = jnp.concatenate([jnp.zeros_like(picture), picture], axis=1)
    return normalize(resize_crop(images.canvas, box, config.size, config.interpolation, limits=limits), config)


def sample_boxes(
    keys: Key[Array, "batch"], size: Int[AnyArray, "batch 2"], config: CropConfig
) -> Int[Array, "batch 4"]:
    """One random box (top, left, height, width) per image of height and width `size`, in pixels.

    Area fraction uniform in `config.scale`, width over height log-uniform in `config.ratio`, position uniform.
    """
    return jax.vmap(lambda key, picture: _sample_box(key, picture, config))(keys, jnp.asarray(size, jnp.int32))


def resize_crop(
    canvas: UInt8[AnyArray, "batch rows columns channels"],
    box: Real[Array, "batch 4"],
    size: tuple[int, int],
    filter: Interpolation,
    *,
    flip: Bool[Array, "batch"] | None = None,
    limits: Real[Array, "batch 4"] | None = None,
) -> Float[Array, "batch {size[0]} {size[1]} channels"]:
    """Resize each canvas's box (top, left, height, width in pixels, fractional allowed) to `size`; values in [0, 1].

    Only pixels that `limits` touches are read. By default the limits are the box, which equals crop-then-resize; a
    wider rectangle of the same form equals resize-then-crop. The box is inside the limits, the limits inside the
    canvas. `flip` mirrors left and right.

    Bicubic weights overshoot, so each pass is clipped, as in Pillow. Differs from Pillow: no rounding to integers;
    bicubic always resizes the columns first, while Pillow from 13 on resizes the rows first if the height shrinks more.
    """
    limits = box if limits is None else limits

    # One weight matrix per image and axis; a flip reverses the matrix of the columns, not the pixels.
    rows, columns = canvas.shape[1:3]
    weigh_rows = _resize_weights(box[:, 0::2], limits[:, 0::2], rows, size[0], filter)
    weigh_columns = _resize_weights(box[:, 1::2], limits[:, 1::2], columns, size[1], filter)
    if flip is not None:
        weigh_columns = jnp.where(flip[:, None, None], weigh_columns[:, ::-1], weigh_columns)

    # Integers up to 255 are exact in every matrix format an accelerator may choose, so the division comes last.
    canvas = jnp.asarray(canvas, jnp.float32)
    return _resize_two_pass(canvas, weigh_rows, weigh_columns, _is_columns_first(rows, columns, size, filter)) / 255


def normalize(
    pixels: Float[Array, "*batch height width channels"], config: CropConfig
) -> Float[Array, "*batch height width channels"]:
    """(pixels - mean) / std for pixel values in [0, 1]. Raises `UserError` if channels and mean differ in number."""
    mean, std = _mean_and_std(pixels, config)
    return (pixels - mean) / std


def denormalize(
    view: Float[Array, "*batch height width channels"], config: CropConfig
) -> Float[Array, "*batch height width channels"]:
    """Pixel values of a normalized view, clipped to [0, 1], for figures. Raises `UserError` as `normalize` does."""
    mean, std = _mean_and_std(view, config)
    return jnp.clip(view * std + mean, 0, 1)


def _mean_and_std(pixels: Array, config: CropConfig) -> tuple[Array, Array]:
    channels = pixels.shape[-1]
    if channels != len(config.mean):
        raise UserError(
            f"crop.mean={config.mean} and crop.std={config.std} have {len(config.mean)} value(s), "
            f"the pictures {channels} channel(s); give one per channel"
        )
    return jnp.asarray(config.mean, pixels.dtype), jnp.asarray(config.std, pixels.dtype)


def _is_range(pair: tuple[float, ...]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf


def _sample_box(key: PRNGKeyArray, picture: Int[Array, "2"], config: CropConfig) -> Int[Array, "4"]:
    """The first of ten draws that fits the image, else the largest central box of an allowed ratio."""
    # All ten sizes are drawn together, so that no loop's length depends on the draws.
    key_area, key_ratio, key_place = jr.split(key, 3)
    low, high = (math.log(ratio) for ratio in config.ratio)
    area = jnp.prod(picture) * jr.uniform(key_area, (_NUM_ATTEMPTS,), minval=config.scale[0], maxval=config.scale[1])
    ratio = jnp.exp(jr.uniform(key_ratio, (_NUM_ATTEMPTS,), minval=low, maxval=high))
    sides = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=1))).astype(picture.dtype)
    fits = jnp.all((sides > 0) & (sides <= picture), axis=1)
    drawn = sides[jnp.argmax(fits)]

    # If no draw fits, `drawn` may exceed the image; its position is then not used.
    place = jr.randint(key_place, (2,), 0, jnp.maximum(picture - drawn, 0) + 1, dtype=picture.dtype)
    central = _central_crop_size(picture, config)
    fallback = jnp.concatenate([(picture - central) // 2, central])
    return jnp.where(jnp.any(fits), jnp.concatenate([place, drawn]), fallback)


def _central_crop_size(picture: Int[Array, "2"], config: CropConfig) -> Int[Array, "2"]:
    """The image's height and width, with the longer side shortened to an allowed ratio."""
    height, width = picture
    tallest = jnp.round(width / config.ratio[0]).astype(picture.dtype)
    widest = jnp.round(height * config.ratio[1]).astype(picture.dtype)
    return jnp.maximum(1, jnp.minimum(picture, jnp.stack([tallest, widest])))


def _center_boxes(picture: Int[Array, "batch 2"], config: CropConfig) -> Float[Array, "batch 4"]:
    """The center crop's box, in pixels of the original image."""
    cover = jnp.asarray([round(side * config.eval_resize_ratio) for side in config.size], picture.dtype)
    # The limiting side is resized to cover exactly, the other in proportion, rounded down as in torchvision's Resize.
    shorter = picture[:, 0] * cover[1] <= picture[:, 1] * cover[0]
    shorter = jnp.stack([shorter, ~shorter], axis=1)
    resized = jnp.where(shorter, cover, (picture * cover[::-1]) // picture[:, ::-1])
    # The crop is centered in the resized image, then converted back to pixels of the original.
    start = (resized - jnp.asarray(config.size)) // 2
    pixels = picture / resized
    return jnp.concatenate([start * pixels, jnp.asarray(config.size) * pixels], axis=1)


def _resize_weights(
    span: Real[Array, "batch 2"], limits: Real[Array, "batch 2"], pixels: int, out: int, filter: Interpolation
) -> Float[Array, "batch out pixels"]:
    """Weight of each input pixel in each output pixel along one axis; spans are (start, length). Rows sum to one."""
    start, length = (side[:, None, None].astype(jnp.float32) for side in span.T)
    first, reach = (side[:, None, None].astype(jnp.float32) for side in limits.T)

    # Distance from each input pixel to each output pixel's center, over the reduction s: the module's formula.
    step = length / out
    pixel = jnp.arange(pixels, dtype=jnp.float32)
    center = start + (jnp.arange(out, dtype=jnp.float32)[:, None] + 0.5) * step
    distance = jnp.abs(pixel + 0.5 - center) / jnp.maximum(step, 1)

    # Weights outside the limits are zero; the others are normalized, so a flat image stays flat.
    touched = (pixel + 1 > first) & (pixel < first + reach)
    weights = jnp.where(touched, _triangle_kernel(distance) if filter == "bilinear" else _cubic_kernel(distance), 0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def _triangle_kernel(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k(x) = max(0, 1 - x) at distances x >= 0."""
    return jnp.maximum(0, 1 - x)


def _cubic_kernel(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Keys' cubic, a = -1/2, x >= 0: 3/2 x^3 - 5/2 x^2 + 1 below 1, -1/2 (x^3 - 5 x^2 + 8 x - 4) below 2."""
    near = (1.5 * x - 2.5) * x**2 + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _is_columns_first(rows: int, columns: int, size: tuple[int, int], filter: Interpolation) -> bool:
    """True for bicubic, where the clip between passes makes the order matter (Pillow's), else if it is cheaper."""
    height, width = size
    return filter == "bicubic" or width * rows * (columns + height) < height * columns * (rows + width)


def _resize_two_pass(
    canvas: Float[Array, "batch rows columns channels"],
    weigh_rows: Float[Array, "batch height rows"],
    weigh_columns: Float[Array, "batch width columns"],
    columns_first: bool,
) -> Float[Array, "batch height width channels"]:
    """Both passes as batched matrix products, each clipped to [0, 255]."""
    passes = [("bor,brxc->boxc", weigh_rows), ("bpx,byxc->bypc", weigh_columns)]
    for product, weights in reversed(passes) if columns_first else passes:
        canvas = jnp.clip(jnp.einsum(product, weights, canvas), 0, 255)
    return canvas
