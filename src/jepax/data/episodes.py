"""Episodes on disk: what an agent saw and did, as plain .npy files and a JSON.

    frames.npy   uint8   (rows, height, width, channels)   what the camera saw
    actions.npy  float32 (rows, action)                    the action that leaves each frame
    states.npy   float32 (rows, state)                     the world's state at each frame
    lengths.npy  int64   (episodes,)                       rows of each episode; one follows the other
    episodes.json                                          where they come from, and each file's sha256; written last

Row t of an episode has frame t and the action between frames t and t + 1. No action leaves an episode's last frame: the
numbers there are zeros, and nobody reads them. `docs/world_models.md` describes the format for other programs.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64, UInt8

from jepax.io import atomic, lock
from jepax.types import UserError

EPISODES_FILE, EPISODES_VERSION = "episodes.json", 1
"""Describes the episodes; written when everything else is there."""
PROGRESS_FILE = "collecting.json"
"""Describes an unfinished folder: its settings, and how much of the files is valid."""
ARRAYS = {"frames": ("uint8", 4), "actions": ("float32", 2), "states": ("float32", 2), "lengths": ("int64", 1)}
"""Type and number of axes of each file's array."""
CHECKED = ("actions", "states", "lengths")
"""Files whose sha256 is compared when they are opened: small ones. Of the frames, only the size is checked."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What happened in episodes, one after the other, without what the camera saw."""

    actions: Float32[np.ndarray, "rows action"]
    states: Float32[np.ndarray, "rows state"]
    lengths: Int64[np.ndarray, "episodes"]
    """Rows of each episode."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Int64[np.ndarray, "episodes"]:
        """The first row of each episode."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, members: Int[np.ndarray, "members"]) -> "Trajectories":
        """Some of the episodes, copied."""
        rows = concatenate_ranges(self.starts[members], self.lengths[members])
        return Trajectories(self.actions[rows], self.states[rows], self.lengths[members])


@dataclass(frozen=True, eq=False)
class Episodes(Trajectories):
    """Episodes in memory, or in files that are read when a row is."""

    frames: UInt8[np.ndarray, "rows height width channels"]
    folder: Path | None = None
    """Folder of the files; None: in memory."""

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """A worker process opens the files again instead of receiving their content."""
        return super().__reduce_ex__(protocol) if self.folder is None else (open_episodes, (self.folder,))


def concatenate_ranges(starts: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Int64[np.ndarray, "total"]:
    """`[starts[0], starts[0] + 1, ...]`, `lengths[0]` numbers, then those of `starts[1]`, and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def open_episodes(folder: Path) -> Episodes:
    """Maps the files of a folder into memory.

    Raises `UserError` where a file is missing, has another type or shape than the format, or is not what was written.
    """
    info = read_info(folder)
    arrays = {name: _open_array(folder, name, info["sha256"]) for name in ARRAYS}
    lengths, rows = arrays["lengths"], {len(arrays[name]) for name in ("frames", "actions", "states")}
    if not len(lengths) or lengths.min() < 1 or rows != {int(lengths.sum())}:
        raise UserError(f"{folder}: its files do not have the rows of the same episodes; copy or collect them again")
    return Episodes(**arrays, folder=folder)


def read_info(folder: Path) -> dict[str, Any]:
    """Reads the description of a folder of episodes. Raises `UserError` where there is none, or another version."""
    path = folder / EPISODES_FILE
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no complete folder of episodes ({EPISODES_FILE}: {_reason(error)}); collect some:"
            f" jepax collect two_room --out {folder}"
        ) from error
    version = info.get("version") if isinstance(info, dict) else None
    if version != EPISODES_VERSION:
        raise UserError(f"{folder} has episodes of version {version}; this jepax reads {EPISODES_VERSION}")
    sums = info.get("sha256")
    if not isinstance(sums, dict) or any(not isinstance(sums.get(name), str) for name in ARRAYS):
        raise UserError(f"{path} has no sha256 of {', '.join(ARRAYS)}; copy or collect the episodes again")
    return info


def _open_array(folder: Path, name: str, sha256: dict[str, str]) -> np.ndarray:
    """Maps a file into memory. Raises `UserError` where it is not the array that the format asks for."""
    path, (dtype, axes) = folder / f"{name}.npy", ARRAYS[name]
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        if array.dtype != dtype or array.ndim != axes:
            raise ValueError(f"{array.dtype} with {array.ndim} axes instead of {dtype} with {axes}")
        if name in CHECKED and _sha256(path) != sha256[name]:
            raise ValueError(f"its content is not what {EPISODES_FILE} describes")
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}; copy or collect the episodes again") from error
    return np.asarray(array)


def _reason(error: Exception) -> str:
    """One line on an error, without the path that the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


def write_episodes(
    folder: Path, settings: dict[str, Any], num_parts: int, make_part: Callable[[int], Episodes]
) -> bool:
    """Writes `make_part(0)`, `make_part(1)`, ... into a folder, or continues there; False: it has them all already.

    A part counts once the progress file, which is replaced atomically, says so; what an interruption left behind it is
    overwritten. So the same parts give the same bytes, however often writing was interrupted.
    `settings` describe the episodes: environment, policy, seed, whatever makes two folders differ.

    Raises `UserError` if the folder has other content or other settings, or is in use.
    """
    with lock.run_lock(folder):
        if (folder / EPISODES_FILE).exists():
            if not settings.items() <= read_info(folder).items():
                raise UserError(f"{folder} holds other episodes; choose another folder, or remove it")
            return False
        progress = _begin(folder, settings)
        for number in range(progress.parts, num_parts):
            progress = _append_part(folder, settings, progress, make_part(number))
        _finish(folder, settings, progress)
    return True


class Progress(NamedTuple):
    """How much of an unfinished folder is valid."""

    parts: int
    episodes: int
    rows: int


def _begin(folder: Path, settings: dict[str, Any]) -> Progress:
    """Notes in a new folder which episodes are begun there, or returns what is there of them."""
    path = folder / PROGRESS_FILE
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise UserError(f"{folder} was begun with other settings; choose another folder, or remove it")
        return Progress(*found["progress"])
    if others := sorted(each.name for each in folder.iterdir() if each.name != lock.LOCK_FILE):
        raise UserError(f"{folder} is not empty, it holds {others[0]}; choose another folder")
    return _commit(folder, settings, Progress(0, 0, 0))


def _append_part(folder: Path, settings: dict[str, Any], progress: Progress, part: Episodes) -> Progress:
    """Writes the next episodes to the disk, then counts them as valid."""
    for name, (dtype, _) in ARRAYS.items():
        before = progress.episodes if name == "lengths" else progress.rows
        rows = getattr(part, name).astype(dtype, casting="same_kind", copy=False)
        append_rows(folder / f"{name}.npy", rows, before)
    after = Progress(progress.parts + 1, progress.episodes + len(part), progress.rows + len(part.frames))
    return _commit(folder, settings, after)


def append_rows(path: Path, rows: np.ndarray, before: int) -> None:
    """Writes rows behind the first `before` ones of a .npy file, to the disk; what follows there is cut off.

    NumPy leaves space in the header for a growing first axis, so the header of a longer array is as long.
    """
    header = io.BytesIO()
    shape = (before + len(rows), *rows.shape[1:])
    described = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    with atomic.with_path_in_error(path), path.open("r+b" if before else "wb") as file:
        file.write(header.getvalue())
        file.seek(before * rows.itemsize * math.prod(rows.shape[1:]), io.SEEK_CUR)
        file.truncate()
        file.write(np.ascontiguousarray(rows).data)
    atomic.fsync(path)


def _commit(folder: Path, settings: dict[str, Any], progress: Progress) -> Progress:
    atomic.atomic_write(folder / PROGRESS_FILE, json.dumps({"settings": settings, "progress": progress}))
    return progress


def _finish(folder: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Writes the description, which makes the folder complete; the progress file is removed after it is written."""
    sums = {name: _sha256(folder / f"{name}.npy") for name in ARRAYS}
    counts = {"episodes": progress.episodes, "rows": progress.rows}
    info = {"version": EPISODES_VERSION, **settings, **counts, "sha256": sums}
    atomic.atomic_write(folder / EPISODES_FILE, json.dumps(info, indent=1) + "\n")
    (folder / PROGRESS_FILE).unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
