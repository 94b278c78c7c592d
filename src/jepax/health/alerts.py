"""The watchdog's alerts, also called alarms, and health.json, which stores them. Rules are in `watchdog.py`."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jepax.distributed import multihost
from jepax.io import atomic
from jepax.types import UserError

AlertValues = dict
"""Measured numbers by name."""


@dataclass(frozen=True)
class Alert:
    """One alarm: its kind, step, numbers and advice."""

    kind: str
    step: int
    numbers: AlertValues
    advice: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.kind} at step {self.step} ({shown})"


HEALTH_FILE = "health.json"


def write_alerts(run: Path, alarms: Iterable[Alert], ended: str | None = None) -> None:
    """Writes `run`/health.json atomically. `ended`: the reason why training stopped before its end."""
    if multihost.is_main_process():
        run.mkdir(parents=True, exist_ok=True)
        values = {"alarms": [asdict(alarm) for alarm in alarms], "ended": ended}
        atomic.atomic_write(run / HEALTH_FILE, json.dumps(values, indent=1) + "\n")


def load_alerts(run: Path) -> list[Alert]:
    """Returns the alarms of a run, none without a health.json. Raises `UserError` if the file is corrupt."""
    return _load(run)[0]


def load_stop_reason(run: Path) -> str | None:
    """Returns the reason why training stopped before its end, or None. Raises `UserError` if the file is corrupt."""
    return _load(run)[1]


def summarize_alerts(run: Path) -> str:
    """Returns a run's health as text: `health: no alarm`, or every alarm with its step and numbers."""
    return f"health: {'; '.join(map(str, load_alerts(run))) or 'no alarm'}"


def _load(run: Path) -> tuple[list[Alert], str | None]:
    path = run / HEALTH_FILE
    if not path.exists():
        return [], None
    try:
        values = json.loads(path.read_text())
        return [Alert(**alarm) for alarm in values["alarms"]], values.get("ended")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what was written; the next training writes it again") from error
