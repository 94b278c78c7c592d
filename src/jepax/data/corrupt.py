"""Reports each corrupt file once, and stops the run if there are too many."""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jepax.data.sources import CorruptExampleError, Source
from jepax.io import events
from jepax.types import UserError

MAX_PRINTED = 10
"""Number of first files that are printed; after them, every hundredth is."""
MAX_SHOWN = 2
"""Number of files that an error shows."""
CHUNK = 4096
"""Examples that `find_corrupt` queues at a time."""


class CorruptLog:
    """Lists a run's corrupt files: the `on_corrupt` of `jepax.data.batches`.

    - `path`: the list (`corrupt_file`), one line {"file": ..., "why": ...} for each file. Files that an earlier part of
      the run, or another process, listed count and are not listed again. None: no list on disk.
    - `share`: fraction of the source's examples that may be corrupt.
    - `print`: called for each of the first files, and then for every hundredth.
    """

    def __init__(
        self, source: Source, path: Path | None, share: float, print: Callable[[str], None] = warnings.warn
    ) -> None:
        self.source, self.path, self.share, self.print = source, path, share, print
        self.why: dict[str, str] = {}
        """Reason by file."""
        if path is not None:
            self.why = read_lists(path.parent)
            if path.exists():  # without the lines that a crash corrupted
                events.rewrite_jsonl(path, events.read_jsonl(path))

    def __call__(self, rows: Int[np.ndarray, " replaced"]) -> None:
        """Lists the files of these rows. Raises `UserError` if all listed files exceed the fraction."""
        for row in map(int, rows):
            if (file := self.source.display_name(row)) not in self.why:
                self._add(file, _reason(self.source, row))
        if len(self.why) > self.share * len(self.source):
            raise UserError(self._too_many())

    def _add(self, file: str, why: str) -> None:
        self.why[file] = why
        if self.path is not None:
            events.append_jsonl(self.path, {"file": file, "why": why})
        count = len(self.why)
        if count <= MAX_PRINTED or count % 100 == 0:
            where = f", listed in {self.path}" if self.path is not None else ""
            self.print(f"warning: {file} cannot be read ({why}) and is replaced; {count} so far{where}")

    def _too_many(self) -> str:
        where, delete = "", ""
        if self.path is not None:
            lists = describe_lists(self.path.parent)
            where, delete = f"; all are listed in {lists}", f" and delete {lists}"
        shown = "\n".join(f"{file}: {why}" for file, why in list(self.why.items())[-MAX_SHOWN:])
        return (
            f"data.max_corrupt_fraction={self.share} of {len(self.source)} examples may be corrupt, but"
            f" {len(self.why)} are"
            f"{where}:\n{shown}\n"
            f"`jepax doctor DATA_ROOT` lists every such file of an image_folder. Repair them{delete};\n"
            "or remove them as well and rerun with --allow-config-change data; or raise data.max_corrupt_fraction."
        )


def find_corrupt(source: Source, num_threads: int) -> Iterator[tuple[str, str]]:
    """Reads every example, and yields name and reason of each that cannot be read."""
    with ThreadPoolExecutor(num_threads) as threads:
        for first in range(0, len(source), CHUNK):
            rows = range(first, min(first + CHUNK, len(source)))
            for row, error in zip(rows, threads.map(lambda row: _read_error(source, row), rows), strict=True):
                if error:
                    yield source.display_name(row), error


def _reason(source: Source, row: int) -> str:
    return _read_error(source, row) or "could be read when it was tried again"


def _read_error(source: Source, row: int) -> str:
    """Reads the example, and returns the error on one line; empty if there is none."""
    try:
        source.load(row)
    except CorruptExampleError as error:
        cause = error.__cause__ or error
        return " ".join(str(cause).split()) or type(cause).__name__
    return ""


def corrupt_file(process: int = 0) -> str:
    """Returns the name of a process's list in the run's folder."""
    return f"corrupt_{process}.jsonl" if process else "corrupt.jsonl"


def find_lists(run: Path) -> list[Path]:
    """Returns the lists of all processes of a run, that of process 0 first."""
    return sorted(run.glob("corrupt*.jsonl"))


def describe_lists(run: Path) -> str:
    """Returns the path of the lists: one file, or a pattern."""
    found = find_lists(run)
    return str(found[0] if len(found) == 1 else run / "corrupt*.jsonl")


def read_lists(run: Path) -> dict[str, str]:
    """Returns the reason by file of all lists of a run."""
    records = [record for path in find_lists(run) for record in events.read_jsonl(path)]
    return {record["file"]: record["why"] for record in records if {"file", "why"} <= set(record)}
