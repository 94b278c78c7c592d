"""`jepax pack PHOTOS PACK`: writes a folder of photos as a few large files of images that fit the canvas.

A file that fits the canvas is copied byte for byte; a larger one is scaled down, as reading it would, and stored as a
JPEG without chroma subsampling. A pack depends on the files and the settings alone, not on the number of threads, and
every machine reads the same pixels from it. Rerunning the command continues an interrupted pack.
"""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from jepax.data import DataConfig
from jepax.data.decode import decode_to_fit, open_header, read_file, wrap_decode_errors
from jepax.data.sources import CorruptExampleError
from jepax.data.sources.image_folder import ImageFolder, open_split
from jepax.data.sources.packed import PACK_FILE, PACK_VERSION, read_names, read_pack_info, shard_filename
from jepax.io import atomic, lock
from jepax.types import UserError

STATE_FILE = "packing.json"
"""File that describes an unfinished pack."""
WRITER_OPTIONS = "group_size:1,uncompressed"
"""Options of the writer: records are read one at a time, and JPEGs do not compress."""
MAX_SHOWN = 2
"""Number of corrupt images that an error shows."""


@dataclass(frozen=True)
class PackConfig:
    """Settings of a pack: `jepax pack --help` describes them."""

    canvas_size: int = 512
    quality: int = 95
    images_per_shard: int = 4096
    num_threads: int = 1
    bit_depth: int = 16


def pack(photos: Path, folder: Path, config: PackConfig, print: Callable[[str], None] = print) -> None:
    """Packs train/ and val/ of `photos` into `folder`, or continues there. See the module's docstring.

    Corrupt images are printed and get an empty record, so that they are replaced as in the folder. Raises `UserError`
    if there are more of them than `data.max_corrupt_fraction` allows by default, if `folder` has other content, if a
    file cannot be opened, and as `image_folder` does.
    """
    canvas = (config.canvas_size, config.canvas_size, 3)
    parts = {"train": "train", "val": "test"}
    sources = {part: open_split(photos, split, 0.0, canvas, config.bit_depth) for part, split in parts.items()}
    files = {part: list(source.files) for part, source in sources.items()}
    settings = {
        "version": PACK_VERSION,
        "canvas": config.canvas_size,
        "bit_depth": config.bit_depth,
        "quality": config.quality,
        "records": config.images_per_shard,
        "classes": list(sources["train"].class_names),
    }
    for part, source in sources.items():
        print(f"{part}: {source.describe()}")
    with lock.run_lock(folder):
        if (folder / PACK_FILE).exists():
            if not is_same(folder, settings, files):
                raise UserError(f"{folder} holds another pack; choose another folder, or remove it")
            print(f"{folder} holds this pack already")
            return
        check_folder(folder, settings | files)
        began = time.perf_counter()
        shards = {part: write_split(source, part, folder, config, print) for part, source in sources.items()}
        count = sum(map(len, sources.values()))
        check_corrupt_fraction(folder, shards, count)

        # The description makes it a pack; files for resuming are removed after it is written.
        for part, names in files.items():
            atomic.atomic_write(folder / f"{part}.json", json.dumps(names))
        atomic.atomic_write(folder / PACK_FILE, json.dumps(settings | {"shards": shards}, indent=1) + "\n")
        for path in (folder / STATE_FILE, *folder.glob("*.note")):
            path.unlink()
        size = sum(shard["bytes"] for part in shards.values() for shard in part) / 1e9
        print(f"{folder}: {count:,} images, {size:.2f} GB, {time.perf_counter() - began:.0f} s")


def is_same(folder: Path, settings: dict[str, Any], files: dict[str, list[str]]) -> bool:
    """True if the pack in the folder has these settings and files of these names."""
    found = read_pack_info(folder) | {part: read_names(folder, part) for part in files}
    return all(found.get(name) == value for name, value in (settings | files).items())


def check_folder(folder: Path, description: dict[str, Any]) -> None:
    """Notes in a new folder which pack is begun there. Raises `UserError` if it has another, or other content."""
    state = folder / STATE_FILE
    if state.exists():
        if json.loads(state.read_text()) != description:
            raise UserError(f"{folder} was begun with other settings or images; choose another folder, or remove it")
    elif others := sorted(path.name for path in folder.iterdir() if path.name != lock.LOCK_FILE):
        raise UserError(f"{folder} is not empty, it holds {others[0]}; choose another folder")
    else:
        atomic.atomic_write(state, json.dumps(description))


def write_split(
    source: ImageFolder, part: str, folder: Path, config: PackConfig, print: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Writes the missing shards of train or val, and returns the description of each."""
    firsts, stop = range(0, len(source), config.images_per_shard), Event()

    def write(first: int) -> dict[str, Any]:
        number, rows = first // config.images_per_shard, range(first, min(first + config.images_per_shard, len(source)))
        shard = write_shard(source, rows, folder / shard_filename(part, number), config, stop)
        print(f"{part}: file {number + 1} of {len(firsts)}, {len(rows):,} images, {shard['bytes'] / 1e6:,.0f} MB")
        for name, why in shard["broken"]:
            print(f"warning: {name} cannot be read ({why}); its record is empty, and it is replaced when it is read")
        return shard

    with ThreadPoolExecutor(config.num_threads) as threads:
        try:
            return list(threads.map(write, firsts))
        except BaseException:
            stop.set()
            threads.shutdown(cancel_futures=True)
            raise


def write_shard(source: ImageFolder, rows: range, path: Path, config: PackConfig, stop: Event) -> dict[str, Any]:
    """Writes the records of these rows as one file, if it is missing, and returns its description."""
    note = path.with_suffix(".note")  # written after the file that it describes
    if note.exists():
        return json.loads(note.read_text())
    part = path.with_suffix(".part")
    try:
        with atomic.with_path_in_error(path):
            corrupt = _write_records(source, rows, part, config, stop)
            atomic.fsync(part)
        part.replace(path)
    except RuntimeError as error:  # the writer's error for a full disk
        raise UserError(f"{path} cannot be written: {error};\nfix the cause and rerun") from error
    finally:
        part.unlink(missing_ok=True)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shard = {"records": len(rows), "bytes": path.stat().st_size, "sha256": digest, "broken": corrupt}
    atomic.atomic_write(note, json.dumps(shard))
    return shard


def _write_records(
    source: ImageFolder, rows: range, path: Path, config: PackConfig, stop: Event
) -> list[tuple[str, str]]:
    """Writes the records, and returns name and reason of the corrupt images, whose records are empty."""
    writer, corrupt = ArrayRecordWriter(str(path), WRITER_OPTIONS), []
    for row in rows:
        if stop.is_set():
            raise InterruptedError
        try:
            writer.write(encode_record(source.folder / source.files[row], config))
        except CorruptExampleError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise  # an error of the disk or of permissions, not of the image
            corrupt.append((source.display_name(row), str(error.__cause__)))
            writer.write(b"")
    writer.close()
    return corrupt


def encode_record(path: Path, config: PackConfig) -> bytes:
    """Returns the image as it is packed. Raises `CorruptExampleError`."""
    with wrap_decode_errors(str(path)):
        data = read_file(path)
        header = open_header(data)
        gray = header.mode in ("1", "L") or header.mode.startswith("I")
        small = decode_to_fit(data, config.canvas_size, config.canvas_size, 1 if gray else 3, config.bit_depth)
        if max(header.size) <= config.canvas_size:
            return data
        colors, subsampling = ("GRAY", "Gray") if gray else ("RGB", "444")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(small), config.quality, colors, subsampling)


def check_corrupt_fraction(folder: Path, shards: dict[str, list[Any]], count: int) -> None:
    """Raises `UserError` if more images are corrupt than a run allows."""
    corrupt = [f"{name}: {why}" for part in shards.values() for shard in part for name, why in shard["broken"]]
    if len(corrupt) > DataConfig.max_corrupt_fraction * count:
        shown = "\n".join(corrupt[:MAX_SHOWN])
        raise UserError(
            f"{len(corrupt)} of {count} images cannot be read, and a run allows"
            f" {DataConfig.max_corrupt_fraction:.0%}:\n"
            f"{shown}\nrepair or remove them, remove {folder}, and pack again"
        )
