"""A folder of photos in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg, of any size, shape and mode."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from jepax.data.decode import SUFFIXES, read_onto_canvas
from jepax.data.sources import Split, rows_of
from jepax.data.sources.photos import Photos, described
from jepax.types import UserError


@dataclass(frozen=True, eq=False)
class ImageFolder(Photos):
    """Files below `folder`."""

    listed: dict[str, str]
    """`contents`, from the listing of the whole folder."""

    def read(self, row: int, canvas: UInt8[np.ndarray, "rows columns channels"]) -> Int32[np.ndarray, "2"]:
        return read_onto_canvas(self.folder / self.files[row], canvas)

    def name_of(self, row: int) -> str:
        return f"{self.folder.name}/{self.files[row]}"

    @property
    def contents(self) -> dict[str, str]:
        """`{"class cat": "1300 files, 3f2a9c..."}`: of each class the number of files and a digest of their names.

        Of the whole folder, the files of train/ being those of the training and the validation split. No file is
        opened: one that was overwritten under its name is not told from the old one.
        """
        return self.listed


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
    contents = {f"class {name}": described(files) for name, files in pictures.items()}
    return ImageFolder((canvas, canvas, channels), names, labels[rows], folder, files, contents)


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
