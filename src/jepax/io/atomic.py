"""Atomic writes, fsync, and OS errors that name their file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def with_path_in_error(path: Path) -> Iterator[None]:
    """Add the path to an OS error that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def atomic_write(path: Path, text: str) -> None:
    """Replace the file by this text. If that fails, the old file stays and nothing else is left."""
    part = path.with_name(f"{path.name}.part")
    try:
        with with_path_in_error(path), part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Append the text to the file, which is created, with its folder, if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with with_path_in_error(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, if it exists."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        with with_path_in_error(path):
            os.fsync(opened)
    finally:
        os.close(opened)
