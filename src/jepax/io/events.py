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
        """Append an event. `step_bound`: it belongs to the step, and recurs if a resumed run repeats the step."""
        if self.writes:
            record = {"event": event, "step": step, "time": round(time.time(), 3)}
            record |= ({"step_bound": True} if step_bound else {}) | details
            append_jsonl(self.path, record)

    def truncate_from(self, start: int) -> None:
        """Drop the step-bound events of steps from `start` on, which are repeated, and corrupt lines."""
        if self.writes and self.path.exists():
            records = read_jsonl(self.path)
            rewrite_jsonl(self.path, (e for e in records if not (e.get("step_bound") and e["step"] >= start)))

    def last(self, name: str, default: str) -> str:
        """The newest value of this detail."""
        return next((record[name] for record in reversed(read_jsonl(self.path)) if name in record), default)


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON Lines file, without those that a crash corrupted; none if the file is missing."""
    return [record for record in _parse_lines(path) if record is not None]


def count_corrupt_lines(path: Path) -> int:
    """Number of lines that `read_jsonl` leaves out."""
    return _parse_lines(path).count(None)


def append_jsonl(path: Path, record: dict) -> None:
    """Append a record to a JSON Lines file, which is created if it is missing."""
    atomic.append_text(path, json.dumps(record) + "\n")


def rewrite_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Replace the file, atomically, by these records."""
    atomic.atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))


def _parse_lines(path: Path) -> list[dict | None]:
    """The record of each line that is not empty; None for a line that is not a JSON object."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    records = []
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        records.append(record if isinstance(record, dict) else None)
    return records
