"""Photos that are decoded when asked for, one by one, and replaced where they cannot be read."""

import abc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from jepax.data.decode import BrokenImage
from jepax.data.sources import Pictures, Readable, Source, digest_of, next_of_class


@dataclass(frozen=True, eq=False)
class Photos(Source):
    """Pictures by name, each decoded once, onto a square canvas."""

    folder: Path
    files: tuple[str, ...]
    """Names in step with `labels`: CLASS/NAME.jpg."""

    @abc.abstractmethod
    def read(self, row: int, canvas: UInt8[np.ndarray, "rows columns channels"]) -> Int32[np.ndarray, "2"]:
        """Decodes the picture of a row into the canvas, zeros beforehand, and returns its height and width there.

        Errors: BrokenImage, naming it.
        """

    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        """Errors: `jepax.data.decode.BrokenImage`, naming the file."""
        canvas, size = self._blank(len(rows))
        for place, row in enumerate(rows):
            size[place] = self.read(int(row), canvas[place])
        return canvas, size, self.labels[rows]

    def load_readable(self, rows: Int[np.ndarray, " batch"]) -> Readable:
        """Errors: `jepax.data.decode.BrokenImage`, naming the file and those that were tried in its place."""
        canvas, size = self._blank(len(rows))
        replaced = np.zeros(len(rows), bool)
        for place, row in enumerate(rows):
            try:
                size[place] = self.read(int(row), canvas[place])
            except BrokenImage as error:
                size[place], replaced[place] = self._read_another(int(row), canvas[place], error), True
        return canvas, size, self.labels[rows], replaced

    def _blank(
        self, count: int
    ) -> tuple[UInt8[np.ndarray, "count rows columns channels"], Int32[np.ndarray, "count 2"]]:
        return np.zeros((count, *self.canvas_shape), np.uint8), np.empty((count, 2), np.int32)

    def _read_another(
        self, row: int, canvas: UInt8[np.ndarray, "rows columns channels"], broken: BrokenImage
    ) -> Int32[np.ndarray, "2"]:
        """Another picture of the row's class. Errors: BrokenImage, so that a lost disk is not read to its end."""
        others = next_of_class(self.labels, row)
        for other in others:
            try:
                return self.read(int(other), canvas)
            except BrokenImage:
                continue
        tried = ", ".join(self.files[other] for other in others) or "its class has no other"
        raise BrokenImage(
            f"{str(broken).splitlines()[0]}\n"
            f"Nor can what was tried in its place: {tried}.\n"
            f"Is {self.folder} still there, whole and readable?"
        ) from broken.__cause__


def described(names: list[str]) -> str:
    """`1300 files, 3f2a9c...`: how many names, and their digest."""
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return f"{len(names)} file{'s' * (len(names) != 1)}, {digest_of(joined)}"
