"""Reads and writes JSON Lines files, and events.jsonl, the log of a run's events."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from jepax.distributed import multihost
from jepax.io import atomic

EVENTS_FILE = "events.jsonl"


class Events:
    """A run's events.jsonl: starts, stops, skipped steps. The main process writes it."""

    def __init__(self, run: Path):
        self.path, self.writes = run / EVENTS_FILE, multihost.is_main_process()

    def add(self, event: str, step: int, *, step_bound: bool = False, **details: object) -> None:
        """Appends an event. `step_bound`: it belongs to the step, and recurs if a resumed run repeats the step."""
        if self.writes:
            record = {"event": event, "step": step, "time": round(time.time(), 3)}
            append_jsonl(self.path, record | ({"step_bound": True} if step_bound else {}) | details)

    def truncate_from(self, start: int, *, keep: str = "") -> None:
        """Drops the events of steps from `start` on, which are repeated, except those named `keep`."""
        if self.writes and self.path.exists():
            records = read_jsonl(self.path)
            retaken = [e.get("step_bound") and e["step"] >= start and e.get("event") != keep for e in records]
            rewrite_jsonl(self.path, (e for e, drop in zip(records, retaken, strict=True) if not drop))

    def last(self, name: str, default: str) -> str:
        """Returns the newest value of this detail."""
        return next((record[name] for record in reversed(read_jsonl(self.path)) if name in record), default)


def read_jsonl(path: Path) -> list[dict]:
    """Returns the records of a JSON Lines file, without those that a crash corrupted; none if it is missing."""
    return [record for record in _parse(path) if record is not None]


def count_corrupt_lines(path: Path) -> int:
    """Counts the lines that `read_jsonl` leaves out."""
    return _parse(path).count(None)


def append_jsonl(path: Path, record: dict) -> None:
    """Appends a record to the file, which is created if it is missing."""
    atomic.append_text(path, json.dumps(record) + "\n")


def rewrite_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Replaces the file, atomically, by these records."""
    atomic.atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def _parse(path: Path) -> list[dict | None]:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [_parse_object(line) for line in lines if line.strip()]


def _parse_object(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
