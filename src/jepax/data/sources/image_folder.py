"""A folder of photos in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg, of any size, shape and mode."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from jepax.data.decode import SUFFIXES, BrokenImage, read_onto_canvas
from jepax.data.sources import Pictures, Readable, Source, Split, digest_of, next_of_class, rows_of
from jepax.types import UserError


@dataclass(frozen=True, eq=False)
class ImageFolder(Source):
    """Files decoded when asked for, each once, onto a square canvas."""

    folder: Path
    files: tuple[str, ...]
    """Paths below `folder`, in step with `labels`."""
    listed: dict[str, str]
    """`contents`, from the listing of the whole folder."""

    def load(self, rows: Int[np.ndarray, " batch"]) -> Pictures:
        """Errors: `jepax.data.decode.BrokenImage`, naming the file."""
        canvas, size = self._blank(len(rows))
        for place, row in enumerate(rows):
            size[place] = self._read(row, canvas[place])
        return canvas, size, self.labels[rows]

    def load_readable(self, rows: Int[np.ndarray, " batch"]) -> Readable:
        """Errors: `jepax.data.decode.BrokenImage`, naming the file and those that were tried in its place."""
        canvas, size = self._blank(len(rows))
        replaced = np.zeros(len(rows), bool)
        for place, row in enumerate(rows):
            try:
                size[place] = self._read(row, canvas[place])
            except BrokenImage as error:
                size[place], replaced[place] = self._read_another(row, canvas[place], error), True
        return canvas, size, self.labels[rows], replaced

    def name_of(self, row: int) -> str:
        return f"{self.folder.name}/{self.files[row]}"

    @property
    def contents(self) -> dict[str, str]:
        """`{"class cat": "1300 files, 3f2a9c..."}`: of each class the number of files and a digest of their names.

        Of the whole folder, the files of train/ being those of the training and the validation split. No file is
        opened: one that was overwritten under its name is not told from the old one.
        """
        return self.listed

    def _blank(
        self, count: int
    ) -> tuple[UInt8[np.ndarray, "count rows columns channels"], Int32[np.ndarray, "count 2"]]:
        return np.zeros((count, *self.canvas_shape), np.uint8), np.empty((count, 2), np.int32)

    def _read(
        self, row: int | np.integer, canvas: UInt8[np.ndarray, "rows columns channels"]
    ) -> Int32[np.ndarray, "2"]:
        return read_onto_canvas(self.folder / self.files[row], canvas)

    def _read_another(
        self, row: int | np.integer, canvas: UInt8[np.ndarray, "rows columns channels"], broken: BrokenImage
    ) -> Int32[np.ndarray, "2"]:
        """Another picture of the row's class. Errors: BrokenImage, so that a lost disk is not read to its end."""
        others = next_of_class(self.labels, int(row))
        for other in others:
            try:
                return self._read(other, canvas)
            except BrokenImage:
                continue
        tried = ", ".join(self.files[other] for other in others) or "its class has no other"
        raise BrokenImage(
            f"{str(broken).splitlines()[0]}\n"
            f"Nor can what was tried in its place: {tried}.\n"
            f"Is {self.folder} still there, whole and readable?"
        ) from broken.__cause__


def open_split(root: str, split: Split, validation: float, canvas: int, channels: int) -> ImageFolder:
    """Lists `root`/train (train and validation splits) or `root`/val (test); no picture is opened.

    Classes are the folders in train/, sorted by name; the order of files does not depend on the file system.
    Errors: UserError for a missing folder, no pictures, or a class in val/ that train/ lacks.
    """
    names = _class_names(_inside(root, "train"))
    folder = _inside(root, "val" if split == "test" else "train")
    strangers = sorted(set(_class_names(folder)) - set(names))
    if strangers:
        raise UserError(f"data.root={root}: val/{strangers[0]} is no class of train/; name both folders alike.")
    pictures = {name: _pictures(folder, name) for name in names}
    listed = [(file, label) for label, name in enumerate(names) for file in pictures[name]]
    if not listed:
        raise UserError(
            f"data.root={root}: no picture found under {folder.name}/CLASS/.\n"
            f"Files must end in one of {' '.join(sorted(SUFFIXES))} (in any case)."
        )
    labels = np.array([label for _, label in listed], np.int32)
    rows = rows_of(split, labels, validation)
    files = tuple(listed[row][0] for row in rows)
    contents = {f"class {name}": _described(files) for name, files in pictures.items()}
    return ImageFolder((canvas, canvas, channels), names, labels[rows], folder, files, contents)


def _described(files: list[str]) -> str:
    names = "\0".join(files).encode("utf-8", "surrogateescape")
    return f"{len(files)} file{'s' * (len(files) != 1)}, {digest_of(names)}"


def _inside(root: str, name: str) -> Path:
    folder = Path(root).expanduser() / name
    if not folder.is_dir():
        raise UserError(
            f"data.root={root} has no folder {name}/.\n"
            "image_folder reads train/CLASS/*.jpg, and val/CLASS/*.jpg as its test split."
        )
    return folder


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))


def _pictures(folder: Path, name: str) -> list[str]:
    """Every picture below folder/name, nested folders included, hidden ones left out; sorted, relative to `folder`."""
    return sorted(_walk(os.path.join(folder, name), name))


def _walk(place: str, relative: str) -> Iterator[str]:
    if not os.path.isdir(place):
        return
    for entry in os.scandir(place):
        below = f"{relative}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, below)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield below
