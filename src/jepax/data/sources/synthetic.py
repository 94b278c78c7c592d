"""Coloured shapes on noise, computed on demand: data for tests and benchmarks that need no file."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from jepax.data.sources import Pictures, Source, Split, rows_of

NAMES = ("circle", "ring", "square", "frame", "triangle", "cross", "bar", "crescent")


@dataclass(frozen=True, eq=False)
class Synthetic(Source):
    """One shape per picture; a picture follows from (seed, pool, row of the pool) alone."""

    seed: int
    pool: int
    """0: the training pictures, held-out ones included; 1: the test pictures."""
    members: Int[np.ndarray, " examples"]
    """Rows of the pool that this split holds, in step with `labels`."""
    varied: bool
    """Whether heights and widths are drawn from [half the canvas, all of it]."""
    images: int
    """Pictures of the whole pool."""

    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        canvas = np.zeros((len(rows), *self.canvas_shape), np.uint8)
        size = np.empty((len(rows), 2), np.int32)
        for place, row in enumerate(rows):
            generator = np.random.default_rng([self.seed, self.pool, int(self.members[row])])
            size[place] = self._draw_size(generator)
            height, width = size[place]
            canvas[place, :height, :width] = draw(generator, int(self.labels[row]), height, width, self.canvas_shape[2])
        return canvas, size, self.labels[rows]

    @property
    def contents(self) -> dict[str, str]:
        """What the pictures are made from; the program that makes them is not described."""
        shape = " x ".join(map(str, self.canvas_shape))
        sizes = "varied sizes" if self.varied else "one size"
        return {"generated shapes": f"{self.images} of {shape}, {sizes}, pool {self.pool}, seed {self.seed}"}

    def _draw_size(self, generator: np.random.Generator) -> Int[np.ndarray, "2"]:
        whole = np.array(self.canvas_shape[:2])
        return generator.integers((whole + 1) // 2, whole + 1) if self.varied else whole


def open_split(
    split: Split,
    *,
    images: int,
    canvas_shape: tuple[int, int, int],
    validation: float = 0.0,
    seed: int = 0,
    varied: bool = False,
) -> Synthetic:
    """`images` counts the training pool; the test pool has a fifth of it. Classes are equally frequent."""
    pool = int(split == "test")
    labels = np.arange(max(1, images // 5) if pool else images, dtype=np.int32) % len(NAMES)
    rows = rows_of(split, labels, validation)
    return Synthetic(canvas_shape, NAMES, labels[rows], seed, pool, rows, varied, len(labels))


def draw(
    generator: np.random.Generator, label: int, height: int | np.integer, width: int | np.integer, channels: int
) -> UInt8[np.ndarray, "height width channels"]:
    """A picture of shape `NAMES[label]`, its colour, place, size and angle and the noise drawn from `generator`."""
    radius = generator.uniform(0.2, 0.4) * min(height, width)
    centre = generator.uniform(0.35, 0.65, 2) * (height, width)
    y, x = np.ogrid[:height, :width]
    turn = np.exp(1j * generator.uniform(-0.5, 0.5))  # within +-29 degrees, so that a square stays one
    z = ((x - centre[1]) + 1j * (y - centre[0])) * (turn / radius)
    back = generator.integers(0, 256, channels)
    front = (back + generator.integers(80, 177, channels)) % 256  # differs from the background in every channel
    noise = generator.integers(-24, 25, (height, width, channels), dtype=np.int16)
    inside = _inside(label, z.real.astype(np.float32), z.imag.astype(np.float32))[..., None]
    return np.clip(np.where(inside, front, back).astype(np.int16) + noise, 0, 255).astype(np.uint8)


def _inside(
    label: int, u: Float32[np.ndarray, "height width"], v: Float32[np.ndarray, "height width"]
) -> Bool[np.ndarray, "height width"]:
    """Points of the shape in its own coordinates, where its radius is one."""
    far, round_ = np.maximum(abs(u), abs(v)), np.hypot(u, v)
    match NAMES[label]:
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
