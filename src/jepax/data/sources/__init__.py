"""The contract of a data source, and of sources of labeled images. One format, one file in this folder."""

import abc
import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from jepax.types import ImageBatch, UserError

SplitName = Literal["train", "validation", "test"]
HOLDOUT_SEED = 20230605
"""The held-out rows never depend on a run's seed: two runs are compared on the same examples."""
MAX_REPLACEMENTS = 8
"""Examples that are tried in place of a corrupt one: if none of them can be read, the fault is the disk's."""

Example = Any
"""One example: a pytree of numpy arrays."""
Batch = Any
"""A pytree of arrays, each with the batch as its first axis, with a field `index`: the examples' global positions."""


class CorruptExampleError(UserError):
    """An example that cannot be read. The message names it; `__cause__` is the reason."""


class Source(abc.ABC):
    """Examples by row number.

    A new kind of data, such as clips or trajectories with actions, implements `__len__`, `load`, `collate` and
    `fingerprint`. The loader does the rest: it shuffles each epoch, splits batches over processes, reads ahead, and
    replaces corrupt examples.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Counts the examples."""

    @abc.abstractmethod
    def load(self, row: int) -> Example:
        """Reads one example. Several threads call this simultaneously.

        The same row gives the same example every time: the host draws no random numbers. Raises `CorruptExampleError`
        where the example is to be replaced; any other error ends the run.
        """

    @abc.abstractmethod
    def collate(self, examples: Iterable[Example], index: Int32[np.ndarray, " batch"]) -> Batch:
        """Makes a batch of `len(index)` examples, of the same shapes every time, and keeps `index` in it.

        `examples` reads each example when the iteration reaches it, so that a batch need not be in memory twice.
        """

    @property
    @abc.abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Describes the data in named parts: equal for equal data on any machine, path and file system.

        Training and validation examples that come from one pool are described together.
        """

    def display_name(self, row: int) -> str:
        """Names an example for a person: its path below `data.root`, if it has one."""
        return f"row {row}"

    def describe(self) -> str:
        """Describes for a person how much is read, and what is left out."""
        return f"{len(self):,} examples"

    def replacements(self, row: int) -> Sequence[int]:
        """Returns the rows, best first, that may replace a corrupt one: here the next ones."""
        return [(row + 1 + place) % len(self) for place in range(min(MAX_REPLACEMENTS, len(self) - 1))]

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[Batch, Bool[np.ndarray, " batch"]]:
        """Reads a batch, and marks the corrupt examples, which are replaced. `index`: `rows`, if not given."""
        replaced = np.zeros(len(rows), bool)

        def read() -> Iterator[Example]:
            for place, row in enumerate(map(int, rows)):
                try:
                    example = self.load(row)
                except CorruptExampleError as error:
                    example, replaced[place] = self._load_replacement(row, error), True
                yield example

        return self.collate(read(), np.asarray(rows if index is None else index, np.int32)), replaced

    def _load_replacement(self, row: int, corrupt: CorruptExampleError) -> Example:
        others = self.replacements(row)
        for other in others:
            with contextlib.suppress(CorruptExampleError):
                return self.load(other)
        tried = ", ".join(map(self.display_name, others)) or "there is no other of its kind"
        raise CorruptExampleError(
            f"{str(corrupt).splitlines()[0]}\n"
            f"Nor could what was tried in its place: {tried}.\n"
            "Is the disk still there and readable?"
        ) from corrupt.__cause__


class ImageExample(NamedTuple):
    """One image and its class."""

    image: UInt8[np.ndarray, "height width channels"]
    label: int | np.integer


@dataclass(frozen=True, eq=False)
class ImageSource(Source):
    """Labeled images that fit a canvas of one size. A new format implements `load` and `fingerprint`."""

    canvas_shape: tuple[int, int, int]
    """Rows, columns, channels."""
    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> str:
        return f"{len(self):,} image{'s' * (len(self) != 1)} of {self.classes} class{'es' * (self.classes != 1)}"

    @abc.abstractmethod
    def load(self, row: int) -> ImageExample: ...

    def collate(self, examples: Iterable[ImageExample], index: Int32[np.ndarray, " batch"]) -> ImageBatch:
        """Puts each image in the top left corner of a canvas, which is zero elsewhere."""
        canvas = np.zeros((len(index), *self.canvas_shape), np.uint8)
        size, label = np.empty((len(index), 2), np.int32), np.empty(len(index), np.int32)
        for place, example in enumerate(examples):
            height, width = example.image.shape[:2]
            canvas[place, :height, :width] = example.image
            size[place], label[place] = (height, width), example.label
        return ImageBatch(canvas, size, index, label)

    def replacements(self, row: int) -> Sequence[int]:
        """Returns the next rows of the same class, so that labels stay right; after the last comes the first."""
        same = np.flatnonzero(self.labels == self.labels[row])
        return np.roll(same, -int(np.searchsorted(same, row)))[1 : 1 + MAX_REPLACEMENTS].tolist()


@dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Images of one size in memory; each is its own canvas."""

    images: UInt8[np.ndarray, "examples rows columns channels"]

    def load(self, row: int) -> ImageExample:
        return ImageExample(self.images[row], self.labels[row])

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[ImageBatch, Bool[np.ndarray, " batch"]]:
        """Reads all images by one indexing, as none can be corrupt."""
        size = np.broadcast_to(np.int32(self.canvas_shape[:2]), (len(rows), 2)).copy()
        index = np.asarray(rows if index is None else index, np.int32)
        return ImageBatch(self.images[rows], size, index, self.labels[rows]), np.zeros(len(rows), bool)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Number, shape and digest of the images, and a digest of their labels: of this split."""
        shape = " x ".join(map(str, self.images.shape[1:]))
        return {
            "images": f"{len(self)} of {shape}, {short_hash(np.ascontiguousarray(self.images).data)}",
            "labels": f"{self.classes} classes, {short_hash(self.labels.astype('<i4').tobytes())}",
        }


@dataclass(frozen=True, eq=False)
class Subset(ImageSource):
    """Some rows of another source of images."""

    source: ImageSource
    rows: Int[np.ndarray, " examples"]

    def load(self, row: int) -> ImageExample:
        return self.source.load(int(self.rows[row]))

    def load_batch(
        self, rows: Int[np.ndarray, " batch"], index: Int[np.ndarray, " batch"] | None = None
    ) -> tuple[ImageBatch, Bool[np.ndarray, " batch"]]:
        """Replaces corrupt images by rows of the other source, whether they are in this one or not."""
        return self.source.load_batch(self.rows[rows], rows if index is None else index)

    def display_name(self, row: int) -> str:
        return self.source.display_name(int(self.rows[row]))

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.source.fingerprint


def short_hash(data: bytes | memoryview) -> str:
    """Returns the first 12 digits of the sha256: enough to distinguish data that nobody made collide."""
    return hashlib.sha256(data).hexdigest()[:12]


def val_mask(labels: Int32[np.ndarray, " examples"], fraction: float) -> Bool[np.ndarray, " examples"]:
    """Marks this fraction of each class (rounded) at random, the same rows at every call.

    Drawn from raw Philox words, whose stream NumPy promises to keep: the split outlives NumPy's releases.
    """
    draw = np.random.Philox(HOLDOUT_SEED).random_raw(len(labels))
    order = np.lexsort((draw, labels))  # class after class, at random within each
    _, starts, inverse, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(len(labels)) - starts[inverse]
    mask = np.empty(len(labels), bool)
    mask[order] = rank < np.rint(fraction * counts)[inverse]
    return mask


def split_rows(split: SplitName, labels: Int32[np.ndarray, " examples"], fraction: float) -> Int[np.ndarray, " rows"]:
    """Returns the split's rows, ascending, of the pool with these labels.

    Raises `UserError` where the held-out fraction leaves nothing for validation or for training.
    """
    if split == "test":
        return np.arange(len(labels))
    mask = val_mask(labels, fraction)
    rows = np.flatnonzero(mask if split == "validation" else ~mask)
    if not len(rows):
        # A fraction that holds out one image of the largest class.
        largest = int(np.bincount(labels).max())
        way_out = f"try {math.ceil(100 / largest) / 100:g}, or add images" if largest > 1 else "add images"
        raise UserError(
            f"data.val_fraction={fraction} leaves no image for the {split} split out of {len(labels)}.\n"
            f"It is a fraction of each class of the training images, rounded to images; {way_out}."
        )
    return rows
