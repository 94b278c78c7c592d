"""Files that are written whole or not at all, and errors that name their file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Within, an error of the system that names no file, such as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(path: Path, text: str) -> None:
    """The file with this text; what was there before stays where that fails, and nothing else is left."""
    part = path.with_name(f"{path.name}.part")
    try:
        with named(path), part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Puts what was written to the file, or the entries of the folder, on the disk, if it is there."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        with named(path):
            os.fsync(opened)
    finally:
        os.close(opened)


def append(path: Path, text: str) -> None:
    """The text at the end of the file, which is made, with its folder, if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), path.open("a") as file:
        file.write(text)
