"""What a source of pictures is, and how a part of it is held out. One format, one file beside this one."""

import abc
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from jepax.types import UserError

Split = Literal["train", "validation", "test"]
HOLDOUT_SEED = 20230605
"""Held-out rows never depend on a run's seed: two runs may be compared on the same pictures."""
REPLACEMENTS = 8
"""Pictures that are tried in the place of one that cannot be read: where none of them can, the fault is not theirs."""

Pictures = tuple[
    UInt8[np.ndarray, "batch rows columns channels"], Int32[np.ndarray, "batch 2"], Int32[np.ndarray, " batch"]
]
"""Canvases, heights and widths of the pictures inside them (pixels), labels."""
Readable = tuple[
    UInt8[np.ndarray, "batch rows columns channels"],
    Int32[np.ndarray, "batch 2"],
    Int32[np.ndarray, " batch"],
    Bool[np.ndarray, " batch"],
]
"""The same, and which of the pictures stand in for one that cannot be read."""


@dataclass(frozen=True, eq=False)
class Source(abc.ABC):
    """Labelled pictures by row number, each on a canvas of one size with the picture in its top left corner."""

    canvas_shape: tuple[int, int, int]
    """Rows, columns, channels."""
    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        """The pictures of these rows. Called by several threads at once.

        The same row gives the same answer every time: the host draws no random numbers here. Errors: what a picture
        that cannot be read raises.
        """

    def load_readable(self, rows: Int[np.ndarray, " batch"]) -> Readable:
        """`load`, with another picture of the same class for each that cannot be read; the last array marks these.

        What stands in follows from the row and the data alone: see `next_of_class`. A source whose pictures cannot
        break need not override this. Errors: where none of the pictures tried can be read.
        """
        return *self.load(rows), np.zeros(len(rows), bool)

    def name_of(self, row: int) -> str:
        """What a person looks for when told of this picture: its path below `data.root`, where it has one."""
        return f"row {row}"

    @property
    @abc.abstractmethod
    def contents(self) -> dict[str, str]:
        """What the data is, in named parts: equal for equal data on any machine, path and file system.

        Training and validation pictures are described together where they come from one pool.
        """


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Pictures of one size held in memory; each is its own canvas."""

    pictures: UInt8[np.ndarray, "examples rows columns channels"]

    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        size = np.broadcast_to(np.int32(self.canvas_shape[:2]), (len(rows), 2)).copy()
        return self.pictures[rows], size, self.labels[rows]

    @property
    def contents(self) -> dict[str, str]:
        """Number, shape and digest of the pictures, and a digest of their labels: of this split."""
        shape = " x ".join(map(str, self.pictures.shape[1:]))
        pictures = digest_of(np.ascontiguousarray(self.pictures).data)
        return {
            "pictures": f"{len(self)} of {shape}, {pictures}",
            "labels": f"{self.classes} classes, {digest_of(self.labels.astype('<i4').tobytes())}",
        }


@dataclass(frozen=True, eq=False)
class Subset(Source):
    """Some rows of another source."""

    source: Source
    rows: Int[np.ndarray, " examples"]

    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        return self.source.load(self.rows[rows])

    def load_readable(self, rows: Int[np.ndarray, " batch"]) -> Readable:
        """Replaced by rows of the other source, whether they are in this one or not."""
        return self.source.load_readable(self.rows[rows])

    def name_of(self, row: int) -> str:
        return self.source.name_of(int(self.rows[row]))

    @property
    def contents(self) -> dict[str, str]:
        """Those of the other source."""
        return self.source.contents


def digest_of(data: bytes | memoryview) -> str:
    """The first 12 digits of the sha256: enough to tell data apart that no one made alike on purpose."""
    return hashlib.sha256(data).hexdigest()[:12]


def next_of_class(labels: Int32[np.ndarray, " examples"], row: int) -> Int[np.ndarray, " others"]:
    """The next rows of `row`'s class after it, at most `REPLACEMENTS`, going on from the first row after the last."""
    same = np.flatnonzero(labels == labels[row])
    place = int(np.searchsorted(same, row))
    return np.roll(same, -place)[1 : 1 + REPLACEMENTS]


def held_out(labels: Int32[np.ndarray, " examples"], share: float) -> np.ndarray:
    """Marks `share` of each class (rounded) at random, the same ones at every call: Bool[examples].

    Built on raw Philox words, whose stream NumPy promises to keep, so the split outlives NumPy's releases.
    """
    draw = np.random.Philox(HOLDOUT_SEED).random_raw(len(labels))
    order = np.lexsort((draw, labels))  # class after class, at random within each
    _, starts, inverse, counts = np.unique(labels[order], return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(len(labels)) - starts[inverse]
    marks = np.empty(len(labels), bool)
    marks[order] = rank < np.rint(share * counts)[inverse]
    return marks


def rows_of(split: Split, labels: Int32[np.ndarray, " examples"], share: float) -> Int[np.ndarray, " rows"]:
    """Row numbers of `split`, ascending, where `labels` are those of the pool that holds it.

    Errors: UserError where the held-out share leaves nothing for validation or nothing for training.
    """
    if split == "test":
        return np.arange(len(labels))
    marks = held_out(labels, share)
    rows = np.flatnonzero(marks if split == "validation" else ~marks)
    if not len(rows):
        raise UserError(
            f"data.validation={share} leaves no picture for the {split} split out of {len(labels)}.\n"
            "It is a share of each class of the training pictures; try 0.1, or bring more pictures."
        )
    return rows


__all__ = [
    "REPLACEMENTS",
    "ArraySource",
    "Pictures",
    "Readable",
    "Source",
    "Split",
    "Subset",
    "digest_of",
    "held_out",
    "next_of_class",
    "rows_of",
]
