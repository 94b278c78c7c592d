"""A run's log: `metrics.jsonl` is the truth, the terminal is a view of it."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jepax import events, files
from jepax.distributed import multihost

Values = dict[str, float | list[float]]
FILE = "metrics.jsonl"
LINE_EVERY = 15.0  # seconds between lines where there is no terminal to draw a bar on


def plain(value: object) -> float | list[float]:
    """A metric as JSON holds it: a number, or a list with one number per layer."""
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else [float(x) for x in array]


class Log:
    """Appends to `metrics.jsonl` and shows progress; use as a context manager.

    A resumed run drops the lines of steps that it is about to take again, and a last line torn by a crash; `kept` are
    the others.
    """

    def __init__(self, path: Path, *, steps: int, start: int):
        self.path, self.steps, self.start = path, steps, start
        self.console = Console(stderr=True, quiet=not multihost.is_main_process())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._last_line = 0.0

    def __enter__(self) -> "Log":
        if lost := events.torn(self.path):
            self.say(f"warning: {self.path}: {lost} of its lines, which a crash tore, cannot be read and are left out")
        self.kept = [line for line in read(self.path) if line["step"] < self.start]
        if not multihost.is_main_process():
            self._file, self._task = open(os.devnull, "w"), self.progress.add_task("training", total=self.steps)
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        events.rewrite(self.path, self.kept)
        self._file = self.path.open("a", buffering=1)
        self.progress.start()
        self._task = self.progress.add_task("training", total=self.steps, completed=self.start, speed="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        try:
            with files.named(self.path):
                self._file.close()
        except OSError:  # of a line that was not written: that has been raised already
            if kind is None:
                raise

    def begin(self, run: Path, batch_size: int, layout: str) -> None:
        """Says what is about to happen, and that the first step compiles."""
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        resumed = f", continuing after step {self.start}" if self.start else ""
        lies = f", {layout}" if jax.device_count() > 1 else ""
        self.say(f"{run}: {self.steps} steps of {batch_size} images on {where}{lies}{resumed}")
        if self.start < self.steps:
            self.say("compiling the training step, once ...")
        self._clock, self._clock_step = time.perf_counter(), self.start

    def compiled(self, loss: jax.Array) -> None:
        """Waits for the first step, says how long it took, and starts the clock of speed."""
        loss.block_until_ready()
        self.say(f"compiled and ran the first step in {time.perf_counter() - self._clock:.1f} s")
        self._first = time.perf_counter() - self._clock
        self._clock, self._clock_step = time.perf_counter(), self.start

    def seconds_per_step(self, step: int) -> float:
        """Mean over the steps since the last call; the first step's holds its compilation."""
        now, passed = time.perf_counter(), step - self._clock_step
        seconds = (now - self._clock) / passed if passed else self._first
        self._clock, self._clock_step = now, step
        return seconds

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, the clock of speed stands still: what is done there is no part of a step."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def say(self, text: str) -> None:
        """One line to the person at the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar: `step` is done."""
        self.progress.update(self._task, completed=step + 1)

    def write(self, step: int, values: Values) -> dict:
        """One line of metrics, as `read` will give it: what is not finite is null, which strict JSON can hold."""
        line = _finite({"step": step, **values})
        with files.named(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        speed = f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"
        self.progress.update(self._task, speed=speed)
        if self.progress.disable and (time.monotonic() - self._last_line > LINE_EVERY or step + 1 == self.steps):
            self._last_line = time.monotonic()
            left = (self.steps - step - 1) * values["seconds_per_step"]
            self.say(f"step {step + 1}/{self.steps}  {speed}  {clock(left)} left")
        return line


def warn(text: str) -> None:
    """One line to the person at the terminal, before or beside a log."""
    print(f"jepax: warning: {text}", file=sys.stderr, flush=True)


def clock(seconds: float | int) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; what a crash tore, or is otherwise no line of a step, is left out."""
    return [line for line in events.read(path) if isinstance(line.get("step"), int)]
