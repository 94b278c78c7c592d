"""What `jepax pack` made of a folder of photos: the same pictures in the same order, in a few large files."""

import json
import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Int, Int32, UInt8

from jepax.data.decode import MOST_BYTES, blamed, onto_canvas
from jepax.data.sources import Split, digest_of, rows_of
from jepax.data.sources.photos import Photos, described
from jepax.types import UserError

PACK, VERSION = "pack.json", 1
"""Says what a pack holds; is written when everything else is there."""


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file and how many records it holds, as its reader wants to be told."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


@dataclass(frozen=True, eq=False)
class Packed(Photos):
    """Records of the shards in `folder`."""

    shards: tuple[Shard, ...]
    records: Int[np.ndarray, " examples"]
    """Of each row, the number of its record, counted over all shards."""
    described: dict[str, str]
    """`contents`, as the pack tells them."""

    @cached_property
    def reader(self) -> ArrayRecordDataSource:
        """Opens a shard when it is first read, for all threads; workers open their own."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = soft + 2 * len(self.shards)  # every shard stays open
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
        return ArrayRecordDataSource(self.shards)

    def read(self, row: int, canvas: UInt8[np.ndarray, "rows columns channels"]) -> Int32[np.ndarray, "2"]:
        with blamed(self.name_of(row)):
            data = self.reader[self.records[row]]
            if len(data) > MOST_BYTES:
                raise ValueError(f"its {len(data)} bytes are over the limit of {MOST_BYTES}")
            return onto_canvas(data, canvas)

    def name_of(self, row: int) -> str:
        return f"{self.folder.name}/{self.files[row]}"

    @property
    def contents(self) -> dict[str, str]:
        """Those of the folder that was packed, and a digest of the shards."""
        return self.described


def open_split(root: str, split: Split, validation: float, canvas: int, channels: int) -> Packed:
    """Opens one split of a pack; the held-out pictures are those that the folder itself would hold out.

    Errors: UserError where this is no whole pack, or was packed for a smaller canvas.
    """
    folder = Path(root).expanduser()
    pack = read_pack(folder)
    if canvas > pack["canvas"]:
        raise UserError(
            f"data.root={root} was packed for data.canvas={pack['canvas']}, and {canvas} asks for more;\n"
            "lower data.canvas, or pack the folder again with --canvas"
        )
    part = "val" if split == "test" else "train"
    names, files = tuple(pack["classes"]), read_names(folder, part)
    numbers = {name: label for label, name in enumerate(names)}
    labels = np.array([numbers.get(file.split("/")[0], -1) for file in files], np.int32)
    shards = shards_of(folder, part, pack)
    if (labels < 0).any() or sum(shard.take for shard in shards) != len(files):
        raise UserError(f"{folder / part}.json does not name the pictures of this pack; copy the pack again")
    rows = rows_of(split, labels, validation)
    return Packed(
        (canvas, canvas, channels),
        names,
        labels[rows],
        folder / part,
        tuple(files[row] for row in rows),
        shards,
        rows,
        contents_of(files, names, pack["shards"][part]),
    )


def read_pack(folder: Path) -> dict[str, Any]:
    """What a pack says of itself. Errors: UserError where there is none, or one of another version."""
    try:
        pack = json.loads((folder / PACK).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.root={folder} is no whole pack ({PACK}: {error}); make one of a folder of photos:\n"
            f"jepax pack PHOTOS {folder}"
        ) from error
    version = pack.get("version") if isinstance(pack, dict) else None
    if version != VERSION:
        raise UserError(f"data.root={folder} is a pack of version {version}; this jepax reads {VERSION}")
    try:
        told = [shard for part in ("train", "val") for shard in pack["shards"][part]]
        numbers = [pack["canvas"], *(shard[name] for shard in told for name in ("records", "bytes"))]
        texts = [*pack["classes"], *(shard["sha256"] for shard in told)]
        if {type(x) for x in numbers} != {int} or {type(x) for x in texts} != {str}:
            raise TypeError("a number or a text is of another type")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / PACK} is no description of a pack ({error!r}); copy the pack again") from error
    return pack


def read_names(folder: Path, part: str) -> list[str]:
    """Of the pictures of train or val, in the order of their records. Errors: UserError where they cannot be read."""
    path = folder / f"{part}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the pack again, or pack the folder again") from error


def shard_name(part: str, number: int) -> str:
    """Of a file beside `PACK`."""
    return f"{part}-{number:05d}.array_record"


def shards_of(folder: Path, part: str, pack: dict[str, Any]) -> tuple[Shard, ...]:
    """Those of train or val. Errors: UserError where one is missing or has another size than when it was packed."""
    found = []
    for number, told in enumerate(pack["shards"][part]):
        path = folder / shard_name(part, number)
        size = path.stat().st_size if path.is_file() else None
        if size != told["bytes"]:
            has = "is missing" if size is None else f"has {size} bytes instead of {told['bytes']}"
            raise UserError(f"{path} {has}; copy the pack again, or pack the folder again")
        found.append(Shard(str(path), told["records"]))
    return tuple(found)


def contents_of(files: list[str], classes: tuple[str, ...], shards: list[dict[str, Any]]) -> dict[str, str]:
    """Each class's names, as a folder tells them, and the digest of what the shards hold."""
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for file in files:
        by_class[file.split("/")[0]].append(file)
    sums = "".join(shard["sha256"] for shard in shards)
    return {f"class {name}": described(names) for name, names in by_class.items()} | {
        "shards": f"{len(shards)}, {digest_of(sums.encode())}"
    }
