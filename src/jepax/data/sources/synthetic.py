"""Colored shapes on noise, computed on demand: data for tests and benchmarks that need no file."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from jepax.data.sources import ImageExample, ImageSource, SplitName, split_rows

SHAPE_NAMES = ("circle", "ring", "square", "frame", "triangle", "cross", "bar", "crescent")


@dataclass(frozen=True, eq=False)
class Synthetic(ImageSource):
    """One shape per image; an image depends on (seed, pool, row of the pool) alone."""

    seed: int
    pool: int
    """0: the training images, held-out ones included; 1: the test images."""
    members: Int[np.ndarray, " examples"]
    """Rows of the pool in this split, in the order of `labels`."""
    varied: bool
    """True: heights and widths are drawn from [half the canvas, all of it]."""
    images: int
    """Number of images in the pool."""

    def load(self, row: int) -> ImageExample:
        generator = np.random.default_rng([self.seed, self.pool, int(self.members[row])])
        canvas = np.array(self.canvas_shape[:2])
        height, width = generator.integers((canvas + 1) // 2, canvas + 1) if self.varied else canvas
        image = draw_shape(generator, int(self.labels[row]), height, width, self.canvas_shape[2])
        return ImageExample(image, self.labels[row])

    @property
    def fingerprint(self) -> dict[str, str]:
        """Describes the parameters, not the program that draws the images."""
        shape = " x ".join(map(str, self.canvas_shape))
        sizes = "varied sizes" if self.varied else "one size"
        return {"generated shapes": f"{self.images} of {shape}, {sizes}, pool {self.pool}, seed {self.seed}"}


def open_split(
    split: SplitName,
    *,
    images: int,
    canvas_shape: tuple[int, int, int],
    validation: float = 0.0,
    seed: int = 0,
    varied: bool = False,
) -> Synthetic:
    """Opens one split. `images`: size of the training pool; the test pool has a fifth. Classes are equally frequent."""
    pool = int(split == "test")
    labels = np.arange(max(1, images // 5) if pool else images, dtype=np.int32) % len(SHAPE_NAMES)
    rows = split_rows(split, labels, validation)
    return Synthetic(canvas_shape, SHAPE_NAMES, labels[rows], seed, pool, rows, varied, len(labels))


def draw_shape(
    generator: np.random.Generator, label: int, height: int | np.integer, width: int | np.integer, channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """Draws shape `SHAPE_NAMES[label]`; its color, place, size, angle and noise come from `generator`."""
    radius = generator.uniform(0.2, 0.4) * min(height, width)
    center = generator.uniform(0.35, 0.65, 2) * (height, width)
    y, x = np.ogrid[:height, :width]
    turn = np.exp(1j * generator.uniform(-0.5, 0.5))  # within +-29 degrees, so that a square stays one
    z = ((x - center[1]) + 1j * (y - center[0])) * (turn / radius)
    back = generator.integers(0, 256, channels)
    front = (back + generator.integers(80, 177, channels)) % 256  # differs from the background in every channel
    noise = generator.integers(-24, 25, (height, width, channels), dtype=np.int16)
    inside = _is_inside_shape(label, z.real.astype(np.float32), z.imag.astype(np.float32))[..., None]
    return np.clip(np.where(inside, front, back).astype(np.int16) + noise, 0, 255).astype(np.uint8)


def _is_inside_shape(
    label: int, u: Float32[np.ndarray, "height width"], v: Float32[np.ndarray, "height width"]
) -> Bool[np.ndarray, "height width"]:
    """Marks the points of the shape, in coordinates in which its radius is 1."""
    far, round_ = np.maximum(abs(u), abs(v)), np.hypot(u, v)
    match SHAPE_NAMES[label]:
        case "circle":
            return round_ < 0.9
        case "ring":
            return (round_ < 1) & (round_ > 0.6)
        case "square":
            return far < 0.8
        case "frame":
            return (far < 0.9) & (far > 0.55)
        case "triangle":
            return (v < 0.7) & (v > 1.8 * abs(u) - 1)
        case "cross":
            return (far < 1) & (np.minimum(abs(u), abs(v)) < 0.3)
        case "bar":
            return (abs(u) < 1) & (abs(v) < 0.3)
        case _:
            return (round_ < 1) & (np.hypot(u - 0.45, v) > 0.8)
