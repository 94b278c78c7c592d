"""What the watchdog says, and the file of a run that holds it."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from jepax import hosts

Numbers = dict
"""What was measured, by name."""


@dataclass(frozen=True)
class Alarm:
    """What was seen, when, by which numbers, and what to try."""

    kind: str
    step: int
    numbers: Numbers
    advice: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
        return f"{self.kind} at step {self.step} ({shown})"


FILE = "health.json"


def write(run: Path, alarms: Iterable[Alarm], ended: str | None = None) -> None:
    """Writes `run`/health.json whole or not at all. `ended` says why training stopped, where it did not finish."""
    if not hosts.first():
        return
    run.mkdir(parents=True, exist_ok=True)
    part = run / f"{FILE}.{os.getpid()}.part"
    part.write_text(json.dumps({"alarms": [asdict(alarm) for alarm in alarms], "ended": ended}, indent=1) + "\n")
    part.replace(run / FILE)


def read(run: Path) -> list[Alarm]:
    """The alarms of a run; none where it has no health.json."""
    path = run / FILE
    return [Alarm(**alarm) for alarm in json.loads(path.read_text())["alarms"]] if path.exists() else []


def summary(run: Path) -> str:
    """A run's health in a line: `health: no alarm`, or every alarm with its step and numbers."""
    return f"health: {'; '.join(map(str, read(run))) or 'no alarm'}"
