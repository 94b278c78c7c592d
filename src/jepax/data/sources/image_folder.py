"""A folder of photos in ImageNet's layout: train/CLASS/*.jpg and val/CLASS/*.jpg, of any size, shape and mode."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepax.data.decode import IMAGE_SUFFIXES, OPTIONAL_SUFFIXES, max_value_16bit, read_file, read_image
from jepax.data.sources import ImageExample, ImageSource, SplitName, short_hash, split_rows
from jepax.io.safe_load import printable
from jepax.types import UserError

MAX_REASONS = 5
"""Number of reasons that a description shows for files that are left out."""
NUM_DEPTH_CHECKS = 16
"""Number of files, at most, that are read to see which values 16-bit images have."""


@dataclass(frozen=True, eq=False)
class ImageFolder(ImageSource):
    """Files below `folder`, decoded each time they are loaded."""

    folder: Path
    files: tuple[str, ...]
    """CLASS/NAME.jpg, in the order of `labels`."""
    listing: dict[str, str]
    left_out: str
    """Numbers of the files below `folder` that are not read, by extension and reason: "12 .heic (...), 3 hidden"."""
    bit_depth: int
    """Bits of the values in 16-bit images."""

    def load(self, row: int) -> ImageExample:
        image = read_image(self.folder / self.files[row], self.canvas_shape, self.bit_depth)
        return ImageExample(image, self.labels[row])

    def describe(self) -> str:
        left_out = f"; left out of {self.folder.name}/: {self.left_out}" if self.left_out else ""
        return f"{super().describe()}{left_out}{self._describe_bit_depth()}"

    def _describe_bit_depth(self) -> str:
        """A warning if 16-bit images use less than a quarter of their range; reads `NUM_DEPTH_CHECKS` of them."""
        deep = [file for file in self.files if file.lower().endswith((".png", ".tif", ".tiff"))]
        largest = 0
        for file in deep[:: max(len(deep) // NUM_DEPTH_CHECKS, 1)][:NUM_DEPTH_CHECKS]:
            with suppress(Exception):  # a corrupt file is reported when it is loaded
                largest = max(largest, max_value_16bit(read_file(self.folder / file)))
        if not 0 < largest < 2 ** (self.bit_depth - 2):
            return ""
        bits = max(largest.bit_length(), 8)
        return (
            f"\nwarning: the largest value of the 16-bit images is {largest:,} of {2**self.bit_depth - 1:,}, so they"
            f" become dark; if their values have {bits} bits: --data.bit-depth {bits} (jepax pack: --bit-depth {bits})"
        )

    def display_name(self, row: int) -> str:
        return f"{self.folder.name}/{self.files[row]}"

    @property
    def fingerprint(self) -> dict[str, str]:
        """`{"class cat": "1300 files, 3f2a9c..."}`: of each class the number of files and a digest of their names.

        The folder is train/, for the training and the validation split together, or val/. No file is opened: one that
        was overwritten under its name is not noticed.
        """
        return self.listing


def open_split(
    root: Path, split: SplitName, validation: float, canvas_shape: tuple[int, int, int], bit_depth: int = 16
) -> ImageFolder:
    """Lists `root`/train (train and validation splits) or `root`/val (test); opens no image.

    Classes are the folders in train/, sorted by name; the order of files does not depend on the file system.
    Raises `UserError` for a missing folder, no images, a class in val/ that train/ lacks, or two classes of one name.
    """
    names = _class_names(_split_folder(root, "train"))
    folder = _split_folder(root, "val" if split == "test" else "train")
    if unknown := sorted(set(_class_names(folder)) - set(names)):
        raise UserError(f"data.root={root}: val/{unknown[0]} is no class of train/; rename one of the folders.")
    left_out = Counter({"outside of the class folders": sum(not entry.is_dir() for entry in os.scandir(folder))})
    found = {name: sorted(_walk_images(os.path.join(folder, name), name, left_out)) for name in names}
    pool = [(file, label) for label, name in enumerate(names) for file in found[name]]
    if not pool:
        raise UserError(
            f"data.root={root}: no image found under {folder.name}/CLASS/.\n"
            f"Files must end in one of {' '.join(sorted(IMAGE_SUFFIXES))} (in any case)."
        )
    labels = np.array([label for _, label in pool], np.int32)
    rows = split_rows(split, labels, validation)
    files = tuple(pool[row][0] for row in rows)
    skipped = "" if split == "validation" else _describe_left_out(left_out)  # validation has the folder of train
    return ImageFolder(canvas_shape, names, labels[rows], folder, files, describe_classes(found), skipped, bit_depth)


def _split_folder(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise UserError(
            f"data.root={root} has no folder {name}/: {_describe_folders(root)}.\n"
            "image_folder reads train/CLASS/*.jpg, and val/CLASS/*.jpg as its test split."
        )
    return folder


def _describe_folders(root: Path) -> str:
    if not root.is_dir():
        return "it is no folder itself"
    found = [printable(name) for name in _folder_names(root)]
    others = f" and {len(found) - MAX_REASONS} more" if len(found) > MAX_REASONS else ""
    return f"it has {', '.join(found[:MAX_REASONS])}{others}" if found else "it has no folders"


def _folder_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))


def _class_names(folder: Path) -> tuple[str, ...]:
    names, seen = _folder_names(folder), {}
    for name in names:
        # One text in two encodings of Unicode (composed and not) looks the same, and would be two classes.
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(f"{folder}: {other!a} and {name!a} are two folders of one name, {name}; merge them")
    return names


def _walk_images(folder: str, relative: str, left_out: Counter[str]) -> Iterator[str]:
    """Yields every image below the folder, nested folders included, as paths from `relative`; counts all others."""
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        below = f"{relative}/{entry.name}"
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_dir():
            yield from _walk_images(entry.path, below, left_out)
        elif suffix in IMAGE_SUFFIXES:
            yield below
        elif suffix in OPTIONAL_SUFFIXES:
            left_out[f'{suffix} (read with the extra: pip install ".[formats]")'] += 1
        else:
            left_out[f"{suffix or 'without an extension'} (not a format that is read)"] += 1


def _describe_left_out(counts: Counter[str]) -> str:
    order = sorted((-count, reason) for reason, count in counts.items() if count)
    shown = [f"{-count:,} {reason}" for count, reason in order[:MAX_REASONS]]
    others = -sum(count for count, _ in order[MAX_REASONS:])
    return ", ".join([*shown, f"{others:,} others"] if others else shown)


def describe_classes(files: dict[str, list[str]]) -> dict[str, str]:
    """Describes the files of each class by their number and a digest of their names."""
    return {f"class {name}": _describe(names) for name, names in files.items()}


def _describe(names: list[str]) -> str:
    joined = "\0".join(names).encode("utf-8", "surrogateescape")
    return f"{len(names)} file{'s' * (len(names) != 1)}, {short_hash(joined)}"
