"""A pack, made by `jepax pack` from a folder of photos: the same images in the same order, in a few large files."""

import json
import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int

from jepax.data.decode import MAX_FILE_BYTES, decode_to_fit, wrap_decode_errors
from jepax.data.sources import ImageExample, ImageSource, SplitName, short_hash, split_rows
from jepax.data.sources.image_folder import ImageFolder, describe_classes
from jepax.types import UserError

PACK_FILE, PACK_VERSION = "pack.json", 2
"""Describes the pack; written when everything else is there."""


@dataclass(frozen=True, eq=False)
class Packed(ImageFolder):
    """The files of an image folder as records of a few large files; its fingerprint has a digest of these, too."""

    shards: tuple[str, ...]
    """Path and records, PATH[0:4096], of each large file: in this form its reader opens none before it is needed."""
    records: Int[np.ndarray, " examples"]
    """Number of each row's record, counted over all shards."""

    @cached_property
    def reader(self) -> ArrayRecordDataSource:
        """Opens a shard when it is first read, for all threads; each worker process opens its own."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = soft + 2 * len(self.shards)  # every shard stays open
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))
        return ArrayRecordDataSource(self.shards)

    def load(self, row: int) -> ImageExample:
        with wrap_decode_errors(self.display_name(row)):
            data = self.reader[self.records[row]]
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"its {len(data)} bytes are over the limit of {MAX_FILE_BYTES}")
            return ImageExample(decode_to_fit(data, *self.canvas_shape, self.bit_depth), self.labels[row])

    def describe(self) -> str:
        return ImageSource.describe(self)  # `jepax pack` printed the rest


def open_split(root: Path, split: SplitName, validation: float, canvas_shape: tuple[int, int, int]) -> Packed:
    """Opens one split of a pack; the held-out images are those of the folder that was packed.

    Raises `UserError` where this is no complete pack, or was packed for a smaller canvas.
    """
    pack, part = read_pack_info(root), "val" if split == "test" else "train"
    if canvas_shape[0] > pack["canvas"]:
        raise UserError(
            f"data.root={root} was packed for data.canvas_size={pack['canvas']}, and {canvas_shape[0]} asks for more;\n"
            "lower data.canvas_size, or pack the folder again with --canvas-size"
        )
    names, files, shards = tuple(pack["classes"]), read_names(root, part), pack["shards"][part]
    numbers = {name: label for label, name in enumerate(names)}
    labels = np.array([numbers.get(file.split("/")[0], -1) for file in files], np.int32)
    paths = list_shards(root, part, shards)
    if (labels < 0).any() or sum(shard["records"] for shard in shards) != len(files):
        raise UserError(f"{root / part}.json does not name the images of this pack; copy the pack again")
    rows = split_rows(split, labels, validation)
    return Packed(
        canvas_shape,
        names,
        labels[rows],
        folder=root / part,
        files=tuple(files[row] for row in rows),
        listing=_describe(files, names, shards),
        left_out="",
        bit_depth=pack["bit_depth"],
        shards=paths,
        records=rows,
    )


def read_pack_info(folder: Path) -> dict[str, Any]:
    """Reads a pack's description. Raises `UserError` where there is none, or one of another version."""
    try:
        pack = json.loads((folder / PACK_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.root={folder} is no complete pack ({PACK_FILE}: {error}); make one of a folder of photos:\n"
            f"jepax pack PHOTOS {folder}"
        ) from error
    version = pack.get("version") if isinstance(pack, dict) else None
    if version != PACK_VERSION:
        raise UserError(f"data.root={folder} is a pack of version {version}; this jepax reads {PACK_VERSION}")
    try:
        shards = [shard for part in ("train", "val") for shard in pack["shards"][part]]
        numbers = [
            pack["canvas"],
            pack["bit_depth"],
            *(shard[name] for shard in shards for name in ("records", "bytes")),
        ]
        texts = [*pack["classes"], *(shard["sha256"] for shard in shards)]
        if {type(x) for x in numbers} != {int} or {type(x) for x in texts} != {str}:
            raise TypeError("a number or a text has another type")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / PACK_FILE} does not describe a pack ({error!r}); copy the pack again") from error
    return pack


def read_names(folder: Path, part: str) -> list[str]:
    """Returns the names of train or val in the order of the records. Raises `UserError` where they cannot be read."""
    path = folder / f"{part}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the pack again, or pack the folder again") from error


def shard_filename(part: str, number: int) -> str:
    """Returns the name of a shard's file."""
    return f"{part}-{number:05d}.array_record"


def list_shards(folder: Path, part: str, shards: list[dict[str, Any]]) -> tuple[str, ...]:
    """Finds the shards of train or val. Raises `UserError` where one is missing or its size has changed."""
    paths = []
    for number, shard in enumerate(shards):
        path = folder / shard_filename(part, number)
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            has = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise UserError(f"{path} {has}; copy the pack again, or pack the folder again")
        paths.append(f"{path}[0:{shard['records']}]")
    return tuple(paths)


def _describe(files: list[str], classes: tuple[str, ...], shards: list[dict[str, Any]]) -> dict[str, str]:
    """Describes each class's names, as the folder's fingerprint does, and the content of the shards."""
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for file in files:
        by_class[file.split("/")[0]].append(file)
    sums = "".join(shard["sha256"] for shard in shards)
    return describe_classes(by_class) | {"shards": f"{len(shards)}, {short_hash(sums.encode())}"}
