"""What happened to a run beside its metrics: starts, stops, steps that were not taken, damage found and mended."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from jepax import files
from jepax.distributed import multihost

FILE = "events.jsonl"


def append(path: Path, line: dict) -> None:
    """One line of JSON at the end of the file, which is made if it is missing."""
    files.append(path, json.dumps(line) + "\n")


def _parsed(path: Path) -> list[dict | None]:
    """Each line of the file that is not empty; None where it is no JSON object."""
    if not path.exists():
        return []
    found: list[dict | None] = []
    for text in path.read_text(errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        found.append(line if isinstance(line, dict) else None)
    return found


def read(path: Path) -> list[dict]:
    """The lines of a file of JSON lines; what a crash tore is left out."""
    return [line for line in _parsed(path) if line is not None]


def torn(path: Path) -> int:
    """How many lines `read` leaves out."""
    return _parsed(path).count(None)


def rewrite(path: Path, lines: Iterable[dict]) -> None:
    """The file with these lines alone, whole or not at all."""
    files.write(path, "".join(json.dumps(line) + "\n" for line in lines))


class Events:
    """`events.jsonl` of a run, which the first of its processes writes."""

    def __init__(self, run: Path):
        self.path, self.writes = run / FILE, multihost.is_main_process()

    def again_from(self, start: int, *, but: str = "") -> None:
        """Drops what steps from `start` on left there, since they are taken again; events named `but` stay."""
        if self.writes and self.path.exists():
            lines = read(self.path)
            rewrite(
                self.path,
                (e for e in lines if e.get("event") == but or not (e.get("retaken") and e["step"] >= start)),
            )

    def last(self, name: str, default: str) -> str:
        """The newest value that an event has under this name."""
        return next((line[name] for line in reversed(read(self.path)) if name in line), default)

    def add(self, event: str, step: int, *, retaken: bool = False, **details: object) -> None:
        """`retaken`: whether the event belongs to the step itself, and comes again when the step is taken again."""
        if self.writes:
            told = {"event": event, "step": step, "time": round(time.time(), 3)}
            append(self.path, told | ({"retaken": True} if retaken else {}) | details)
