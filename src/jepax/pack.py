"""A folder of photos as a few large files of pictures that fit the canvas.

A file that fits the canvas is kept byte for byte; a larger one is scaled down, as reading it would, and kept as a JPEG
without chroma subsampling. Everything follows from the files and the settings alone, whatever the number of threads,
and a pack reads alike on every machine, so runs on it are equal bit for bit. Packing that was ended goes on.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from jepax import files, lock
from jepax.data import DataConfig
from jepax.data.decode import BrokenImage, blamed, bytes_of, fitted, is_grey, longer_side
from jepax.data.sources import image_folder
from jepax.data.sources.packed import PACK, VERSION, read_names, read_pack, shard_name
from jepax.distributed import multihost
from jepax.types import UserError

PARTIAL = "packing.json"
"""Says what is being packed, until it is done."""
OPTIONS = "group_size:1,uncompressed"
"""Records are read one at a time, and JPEGs do not compress."""
SHOWN = 2
"""Broken pictures that an error shows."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class PackConfig:
    """How pictures are packed."""

    canvas_size: int = 512
    """Longest side in pixels; larger pictures are scaled down."""
    quality: int = 95
    """Of the JPEGs of pictures that were scaled down; in [1, 100]."""
    images_per_shard: int = 4096
    """Pictures in one file."""
    threads: int = field(default_factory=multihost.cores)
    """Files that are written at once."""


def pack(photos: Path, folder: Path, config: PackConfig, say: Say = print) -> None:
    """Packs train/ and val/ of `photos` into `folder`, or goes on with it. See the module's first lines.

    Pictures that cannot be decoded keep their place, empty, so that they are replaced as in the folder; they are named.
    Errors: UserError where more of them are broken than `data.broken_share` allows by default, where `folder` holds
    something else, where a file cannot be opened, and those of `image_folder`.
    """
    sources = {
        part: image_folder.open_split(str(photos), split, 0.0, config.canvas_size, 3)
        for part, split in (("train", "train"), ("val", "test"))
    }
    told = {
        "version": VERSION,
        "canvas": config.canvas_size,
        "quality": config.quality,
        "records": config.images_per_shard,
        "classes": list(sources["train"].class_names),
    }
    with lock.held(folder):
        if (folder / PACK).exists():
            if same(told, read_pack(folder), sources, folder):
                say(f"{folder} holds this pack already")
                return
            raise UserError(f"{folder} holds another pack; take another folder, or remove it")
        begin(folder, told, sources)
        start = time.perf_counter()
        shards = {part: write(source, part, folder, config, say) for part, source in sources.items()}
        count = sum(map(len, sources.values()))
        refuse_broken(folder, shards, count)
        files.write(folder / PACK, json.dumps(told | {"shards": shards}, indent=1) + "\n")
        for path in (folder / PARTIAL, *folder.glob("*.note")):
            path.unlink()
        size = sum(shard["bytes"] for part in shards.values() for shard in part) / 1e9
        say(f"{folder}: {count:,} pictures, {size:.2f} GB, {time.perf_counter() - start:.0f} s")


def same(told: dict[str, Any], found: dict[str, Any], sources: dict[str, Any], folder: Path) -> bool:
    """Whether a pack, or one that was begun, is of these settings and of files of these names."""
    if {name: found.get(name) for name in told} != told:
        return False
    return all(read_names(folder, part) == list(source.files) for part, source in sources.items())


def begin(folder: Path, told: dict[str, Any], sources: dict[str, Any]) -> None:
    """Writes down what is to be packed. Raises `UserError` where the folder holds something else."""
    partial = folder / PARTIAL
    found = json.loads(partial.read_text()) if partial.exists() else None
    if found is None and (others := sorted(path.name for path in folder.iterdir() if path.name != lock.FILE)):
        raise UserError(f"{folder} is not empty, it holds {others[0]}; take another folder")
    if found:
        if not same(told, found, sources, folder):
            raise UserError(f"{folder} was begun with other settings or pictures; take another folder, or remove it")
        return
    files.write(partial, "{}")  # until the names are there
    for part, source in sources.items():
        files.write(folder / f"{part}.json", json.dumps(source.files))
    files.write(partial, json.dumps(told))


def write(source: image_folder.ImageFolder, part: str, folder: Path, config: PackConfig, say: Say) -> list[Any]:
    """Writes the shards of train or val that are not there yet, and returns what `PACK` tells of each."""
    firsts, ended = range(0, len(source), config.images_per_shard), Event()

    def one(first: int) -> dict[str, Any]:
        number = first // config.images_per_shard
        rows = range(first, min(first + config.images_per_shard, len(source)))
        told = write_shard(source, rows, folder / shard_name(part, number), config, ended)
        say(f"{part}: file {number + 1} of {len(firsts)}, {len(rows):,} pictures, {told['bytes'] / 1e6:,.0f} MB")
        for name, why in told["broken"]:
            say(f"warning: {name} cannot be read ({why}); its place is empty, and another of its class will stand in")
        return told

    with ThreadPoolExecutor(config.threads) as threads:
        try:
            return list(threads.map(one, firsts))
        except BaseException:
            ended.set()
            threads.shutdown(cancel_futures=True)
            raise


def write_shard(
    source: image_folder.ImageFolder, rows: range, path: Path, config: PackConfig, ended: Event
) -> dict[str, Any]:
    """The records of these rows as one file, if it is not there, and what `PACK` tells of it."""
    note = path.with_suffix(".note")
    if note.exists():  # written after the file that it tells of
        return json.loads(note.read_text())
    broken, part = [], path.with_suffix(".part")
    try:
        with files.named(path):
            writer = ArrayRecordWriter(str(part), OPTIONS)
            for row in rows:
                if ended.is_set():
                    raise InterruptedError
                try:
                    writer.write(record(source.folder / source.files[row], config))
                except BrokenImage as error:
                    if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                        raise  # the disk's fault, or a right that is missing: not the picture's
                    broken.append([source.name_of(row), str(error.__cause__)])
                    writer.write(b"")
            writer.close()
            files.sync(part)
        part.replace(path)
    except RuntimeError as error:  # the writer's words for a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error};\nmend the cause, and the same command goes on") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = {"records": len(rows), "bytes": path.stat().st_size, "sha256": digest, "broken": broken}
    files.write(note, json.dumps(told))
    return told


def record(path: Path, config: PackConfig) -> bytes:
    """A picture as it is packed. Errors: `BrokenImage`."""
    with blamed(str(path)):
        data = bytes_of(path)
        grey = is_grey(data)
        small = fitted(data, config.canvas_size, config.canvas_size, 1 if grey else 3)
        if longer_side(data) <= config.canvas_size:
            return data
        return simplejpeg.encode_jpeg(
            np.ascontiguousarray(small), config.quality, "GRAY" if grey else "RGB", "Gray" if grey else "444"
        )


def refuse_broken(folder: Path, shards: dict[str, list[Any]], count: int) -> None:
    """Raises `UserError` where more pictures could not be read than a run would put up with."""
    broken = [f"{name}: {why}" for part in shards.values() for shard in part for name, why in shard["broken"]]
    if len(broken) > DataConfig.broken_share * count:
        shown = "\n".join(broken[:SHOWN])
        raise UserError(
            f"{len(broken)} of {count} pictures cannot be read, and a run puts up with {DataConfig.broken_share:.0%}:\n"
            f"{shown}\nrepair or remove them, remove {folder}, and pack again"
        )
