"""One process per run folder: a lock that the system takes back when its holder ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jepax import files
from jepax.types import UserError

FILE = "lock"
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
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(file)


def holder(run: Path) -> str:
    """Who holds the lock, in words."""
    try:
        return (run / FILE).read_text().strip() or "another process"
    except OSError:
        return "another process"


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
