"""One process per run folder: a lock that the OS releases when its owner ends, however it ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepax.distributed import multihost
from jepax.io import atomic
from jepax.types import UserError

LOCK_FILE = "lock"
SHARED_FS_TIMEOUT_S = 60
"""Seconds until a network file system shows a write to every host."""
_owned: set[Path] = set()


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Reserve the run folder, created if it is missing, for this process; reentrant.

    The file remains: only the OS lock on it counts. Raises `UserError`, naming the owner, if another process has
    reserved the folder, and if a file is in its place.
    """
    path = run.absolute()
    if path in _owned:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{run} cannot be a folder: a file is there, or above it; choose another --run-dir") from error
    with open(path / LOCK_FILE, "ab", buffering=0) as file:
        # Lock, then write the owner's name, visible to every host.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run} is in use by {owner(run)}; two processes would corrupt it:\n"
                "wait for it, stop it, or choose another --run-dir"
            ) from error
        with atomic.with_path_in_error(path / LOCK_FILE):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode())
            os.fsync(file)
        _owned.add(path)
        try:
            yield
        finally:
            _owned.discard(path)


def owner(run: Path) -> str:
    """The name of the lock's owner; one that has just locked it gets a second to write its name."""
    for _ in range(20):
        with suppress(OSError):
            if name := (run / LOCK_FILE).read_text().strip():
                return name
        time.sleep(0.05)
    return "another process"


def check_shared_filesystem(run: Path) -> None:
    """Raise `UserError` if this process does not see the folder that process 0 locked. Every process calls it."""
    expected, end = multihost.all_gather_str(owner(run))[0], time.monotonic() + SHARED_FS_TIMEOUT_S
    while owner(run) != expected:
        if time.monotonic() > end:
            raise UserError(
                f"{run} on {socket.gethostname()} is not the folder of that name that process 0 writes into;\n"
                "choose a --run-dir on a file system that all hosts share"
            )
        time.sleep(0.2)


def is_locked(run: Path) -> bool:
    """True if a process owns the lock now."""
    with suppress(OSError), (run / LOCK_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
        except BlockingIOError:
            return True
    return False
