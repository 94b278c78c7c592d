"""What a source of pictures is, and how a part of it is held out. One format, one file beside this one."""

import abc
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, UInt8

from jepax.types import UserError

Split = Literal["train", "validation", "test"]
HOLDOUT_SEED = 20230605
"""Held-out rows never depend on a run's seed: two runs may be compared on the same pictures."""


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

    @property
    def contents(self) -> dict[str, str]:
        return {}

    @abc.abstractmethod
    def load(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[
        UInt8[np.ndarray, "batch rows columns channels"], Int32[np.ndarray, "batch 2"], Int32[np.ndarray, " batch"]
    ]:
        """Canvases, heights and widths of the pictures inside them (pixels), labels. Called by several threads at once.

        The same row gives the same answer every time: the host draws no random numbers here.
        """


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Pictures of one size held in memory; each is its own canvas."""

    pictures: UInt8[np.ndarray, "examples rows columns channels"]

    def load(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[
        UInt8[np.ndarray, "batch rows columns channels"], Int32[np.ndarray, "batch 2"], Int32[np.ndarray, " batch"]
    ]:
        size = np.broadcast_to(np.int32(self.canvas_shape[:2]), (len(rows), 2)).copy()
        return self.pictures[rows], size, self.labels[rows]


@dataclass(frozen=True, eq=False)
class Subset(Source):
    """Some rows of another source."""

    source: Source
    rows: Int[np.ndarray, " examples"]

    def load(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[
        UInt8[np.ndarray, "batch rows columns channels"], Int32[np.ndarray, "batch 2"], Int32[np.ndarray, " batch"]
    ]:
        return self.source.load(self.rows[rows])


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


__all__ = ["ArraySource", "Source", "Split", "Subset", "held_out", "rows_of"]
