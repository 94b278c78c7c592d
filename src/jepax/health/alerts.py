"""What the watchdog says, and the file of a run that holds it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jepax.distributed import multihost
from jepax.io import atomic
from jepax.types import UserError

AlertValues = dict
"""What was measured, by name."""


@dataclass(frozen=True)
class Alert:
    """What was seen, when, by which numbers, and what to try."""

    kind: str
    step: int
    numbers: AlertValues
    advice: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.kind} at step {self.step} ({shown})"


HEALTH_FILE = "health.json"


def write_alerts(run: Path, alarms: Iterable[Alert], ended: str | None = None) -> None:
    """Writes `run`/health.json whole or not at all. `ended` says why training stopped, where it did not finish."""
    if not multihost.is_main_process():
        return
    run.mkdir(parents=True, exist_ok=True)
    told = {"alarms": [asdict(alarm) for alarm in alarms], "ended": ended}
    atomic.atomic_write(run / HEALTH_FILE, json.dumps(told, indent=1) + "\n")


def load_alerts(run: Path) -> list[Alert]:
    """The alarms of a run; none where it has no health.json. Raises `UserError` where that is damaged."""
    return [Alert(**alarm) for alarm in _load(run).get("alarms", [])]


def load_stop_reason(run: Path) -> str | None:
    """Why training stopped, where it did not finish. Raises `UserError` where health.json is damaged."""
    return _load(run).get("ended")


def _load(run: Path) -> dict:
    path = run / HEALTH_FILE
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
        return {"ended": told.get("ended"), "alarms": [asdict(Alert(**alarm)) for alarm in told["alarms"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what was written; the next training writes it anew") from error


def summarize_alerts(run: Path) -> str:
    """A run's health in a line: `health: no alarm`, or every alarm with its step and numbers."""
    return f"health: {'; '.join(map(str, load_alerts(run))) or 'no alarm'}"
