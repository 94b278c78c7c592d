"""One process per run folder: a lock that the system takes back when its holder ends, however it ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepax import files
from jepax.distributed import multihost
from jepax.types import UserError

FILE = "lock"
PATIENCE = 60
"""Seconds after which a network's file system shows every host what another one wrote."""
_held: set[Path] = set()


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Within, the run folder (made if it is missing) belongs to this process. Raises `UserError` naming the holder,
    and where a file lies in the way.

    Taking it again inside is allowed. The file stays behind; only the system's lock on it counts.
    """
    path = run.absolute()
    if path in _held:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{run} cannot be a folder: a file is there, or above it; take another --run-dir") from error
    file = os.open(path / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run} is in use by {holder(run)}; two processes would spoil it:\n"
                "wait for it, end it, or take another --run-dir"
            ) from error
        with files.named(path / FILE):
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n".encode())
            os.fsync(file)  # for `refuse_others`: other hosts see it now
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(file)


def holder(run: Path) -> str:
    """Who holds the lock, in words; whoever has just taken it gets a second to write its name."""
    for _ in range(20):
        with suppress(OSError):
            if said := (run / FILE).read_text().strip():
                return said
        time.sleep(0.05)
    return "another process"


def refuse_others(run: Path) -> None:
    """Raises `UserError` where this process does not see the folder that process 0 holds. All have to call it."""
    held, end = multihost.all_gather_str(holder(run))[0], time.monotonic() + PATIENCE
    while holder(run) != held:
        if time.monotonic() > end:
            raise UserError(
                f"{run} on {socket.gethostname()} is not the folder of that name that process 0 writes into;\n"
                "take a --run-dir on a file system that all hosts share"
            )
        time.sleep(0.2)


def is_held(run: Path) -> bool:
    """Whether some process holds the lock now; without taking it for longer than the question."""
    try:
        file = os.open(run / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
