"""A folder of photos in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg, of any size, shape and mode."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from jepax.data.decode import SUFFIXES, read_onto_canvas
from jepax.data.sources import Source, Split, rows_of
from jepax.types import UserError


@dataclass(frozen=True, eq=False)
class ImageFolder(Source):
    """Files decoded when asked for, each once, onto a square canvas."""

    folder: Path
    files: tuple[str, ...]
    """Paths below `folder`, in step with `labels`."""

    def load(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[
        UInt8[np.ndarray, "batch rows columns channels"], Int32[np.ndarray, "batch 2"], Int32[np.ndarray, " batch"]
    ]:
        """Errors: `jepax.data.decode.BrokenImage`, naming the file."""
        canvas = np.zeros((len(rows), *self.canvas_shape), np.uint8)
        size = np.empty((len(rows), 2), np.int32)
        for place, row in enumerate(rows):
            size[place] = read_onto_canvas(self.folder / self.files[row], canvas[place])
        return canvas, size, self.labels[rows]


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
    listed = [(file, label) for label, name in enumerate(names) for file in _pictures(folder, name)]
    if not listed:
        raise UserError(
            f"data.root={root}: no picture found under {folder.name}/CLASS/.\n"
            f"Files must end in one of {' '.join(sorted(SUFFIXES))} (in any case)."
        )
    labels = np.array([label for _, label in listed], np.int32)
    rows = rows_of(split, labels, validation)
    files = tuple(listed[row][0] for row in rows)
    return ImageFolder((canvas, canvas, channels), names, labels[rows], folder, files)


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
