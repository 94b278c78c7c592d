"""What is told of pictures that cannot be read: each file once, and an end to it where there are too many."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jepax import events, files
from jepax.data.sources import Source
from jepax.types import UserError

BROKEN = "broken.jsonl"
"""Name of the list in a run's folder."""
SPOKEN = 10
"""Files that are each spoken of; after them, every hundredth is."""
SHOWN = 3
"""Files that an error shows."""


class BrokenFiles:
    """Keeps the list of a run's unreadable pictures: give it to `jepax.data.batches` as `broken`.

    - `path`: of the list, one line of JSON for each file, {"file": ..., "why": ...}. What an earlier part of the run
      listed there, or in another process's list beside it, counts and is not listed again; a line torn by a crash is
      dropped. None keeps no list on disk.
    - `share`: of the source's pictures that may be unreadable, `data.broken_share`.
    - `say`: is given one line for each of the first files, and then for every hundredth.
    """

    def __init__(
        self, source: Source, path: Path | None, share: float, say: Callable[[str], None] = warnings.warn
    ) -> None:
        self.source, self.path, self.share, self.say = source, path, share, say
        self.why: dict[str, str] = listed(path.parent) | _mended(path) if path is not None else {}
        """Reason by file."""

    def __call__(self, rows: Int[np.ndarray, " replaced"]) -> None:
        """Notes the files of these rows. Errors: UserError where, with earlier ones, they exceed the share."""
        for row in map(int, rows):
            if (file := self.source.name_of(row)) not in self.why:
                self._note(file, _why(self.source, row))
        if len(self.why) > self.share * len(self.source):
            raise UserError(self._too_many())

    def _note(self, file: str, why: str) -> None:
        self.why[file] = why
        if self.path is not None:
            files.append(self.path, _line(file, why))
        count = len(self.why)
        if count <= SPOKEN or count % 100 == 0:
            where = f", listed in {self.path}" if self.path is not None else ""
            self.say(f"warning: {file} cannot be read ({why}); another of its class stands in; {count} so far{where}")

    def _too_many(self) -> str:
        delete = f", and delete {place(self.path.parent)}" if self.path is not None else ""
        where = f"; all are listed in {place(self.path.parent)}" if self.path is not None else ""
        files = "\n".join(f"{file}: {why}" for file, why in list(self.why.items())[-SHOWN:])
        return (
            f"data.broken_share={self.share} of {len(self.source)} pictures may be unreadable, but {len(self.why)} are"
            f"{where}:\n{files}\n"
            f"Repair or remove them{delete}; or raise data.broken_share."
        )


def warner(source: Source) -> Callable[[Int[np.ndarray, " replaced"]], None]:
    """A `broken` for who gives none: warns of the first picture, once."""
    warned = False

    def warn(rows: Int[np.ndarray, " replaced"]) -> None:
        nonlocal warned
        if not warned:
            warned = True
            name = source.name_of(int(rows[0]))
            warnings.warn(
                f"{name} cannot be read; another picture of its class stands in for it, and for others that cannot.",
                stacklevel=2,
            )

    return warn


def _why(source: Source, row: int) -> str:
    """What the reading of this picture alone fails with, on one line."""
    try:
        source.load(np.array([row]))
    except UserError as error:
        cause = error.__cause__ or error
        return " ".join(str(cause).split()) or type(cause).__name__
    return "could be read when it was tried again"


def _line(file: str, why: str) -> str:
    return json.dumps({"file": file, "why": why}) + "\n"


def lists(run: Path) -> list[Path]:
    """The lists of all processes of a run, of process 0 first."""
    return sorted(run.glob(f"{Path(BROKEN).stem}*.jsonl"))


def place(run: Path) -> str:
    """Where the lists of a run lie, to be shown."""
    found = lists(run)
    return str(found[0] if len(found) == 1 else run / f"{Path(BROKEN).stem}*.jsonl")


def listed(run: Path) -> dict[str, str]:
    """What the lists of a run hold: reason by file."""
    return {file: why for path in lists(run) for file, why in _entries(path).items()}


def _entries(path: Path) -> dict[str, str]:
    return {line["file"]: line["why"] for line in events.read(path) if {"file", "why"} <= set(line)}


def _mended(path: Path) -> dict[str, str]:
    """The list as it lies there, its torn lines left out, there too."""
    if not path.exists():
        return {}
    entries = _entries(path)
    lines = [{"file": file, "why": why} for file, why in entries.items()]
    if path.read_text(errors="replace") != "".join(_line(**line) for line in lines):
        events.rewrite(path, lines)
    return entries
