"""Writes metrics.jsonl, the source of truth, and shows progress in the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jepax.distributed import multihost
from jepax.io import atomic, events

MetricValues = dict[str, float | list[float]]
METRICS_FILE = "metrics.jsonl"
PRINT_EVERY_S = 15.0  # between progress messages, if the output is not a terminal and has no progress bar


class MetricsFile:
    """Appends records to metrics.jsonl. A resumed run drops corrupt lines, and the steps that it repeats."""

    def __init__(self, path: Path, *, start: int):
        self.path, self.num_corrupt_lines = path, events.count_corrupt_lines(path)
        self.previous_lines = [record for record in read_metrics(path) if record["step"] < start]
        if multihost.is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            events.rewrite_jsonl(path, self.previous_lines)
        self._file = (path if multihost.is_main_process() else Path(os.devnull)).open("a", buffering=1)

    def write(self, step: int, values: MetricValues) -> dict:
        """Appends a record and returns it. Values that are not finite become null, as strict JSON has no others."""
        record = _nulls_for_non_finite({"step": step, **values})
        with atomic.with_path_in_error(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        return record

    def close(self) -> None:
        with atomic.with_path_in_error(self.path):
            self._file.close()


class Log:
    """A run's metrics file, its progress in the terminal, and the time per step; a context manager."""

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
        has_bar = self.console.is_terminal and multihost.is_main_process()
        self.progress = Progress(*columns, console=self.console, disable=not has_bar)
        self._printed = 0.0

    def __enter__(self) -> "Log":
        self.metrics = MetricsFile(self.path, start=self.start)
        self.previous_lines = self.metrics.previous_lines
        if lost := self.metrics.num_corrupt_lines:
            self.print(f"warning: {self.path}: {lost} lines that a crash corrupted are dropped")
        self.progress.start()
        self._task = self.progress.add_task("training", total=self.steps, completed=self.start, speed="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        try:
            self.metrics.close()
        except OSError:  # `write` has raised it already
            if kind is None:
                raise

    def write(self, step: int, values: MetricValues) -> dict:
        """Writes a record to metrics.jsonl, shows the loss and the speed, and returns the record."""
        record = self.metrics.write(step, values)
        speed = f"loss {values['train/loss']:.4f}  {values['perf/images_per_sec']:.0f} examples/s"
        self.progress.update(self._task, speed=speed)
        if self.progress.disable and (time.monotonic() - self._printed > PRINT_EVERY_S or step + 1 == self.steps):
            self._printed = time.monotonic()
            left = (self.steps - step - 1) * values["perf/step_time"]
            self.print(f"step {step + 1}/{self.steps}  {speed}  {format_duration(left)} left")
        return record

    def print(self, text: str) -> None:
        """Prints text above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def set_progress(self, step: int) -> None:
        """Advances the progress bar to `step`."""
        self.progress.update(self._task, completed=step + 1)

    def print_header(self, run: Path, batch_size: int, layout: str) -> None:
        """Prints the run's header, and starts the timer."""
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        sharded = f", {layout}" if jax.device_count() > 1 else ""
        resumed = f", continuing after step {self.start}" if self.start else ""
        self.print(f"{run}: {self.steps} steps of {batch_size} examples on {where}{sharded}{resumed}")
        if self.start < self.steps:
            self.print("compiling the training step, once ...")
        self._time, self._timed_step = time.perf_counter(), self.start

    def report_compile_time(self, loss: jax.Array) -> None:
        """Waits for the first step, prints its time, and restarts the timer."""
        loss.block_until_ready()
        self._first_step_s = time.perf_counter() - self._time
        self.print(f"compiled and ran the first step in {self._first_step_s:.1f} s")
        self._time, self._timed_step = time.perf_counter(), self.start

    def seconds_per_step(self, step: int) -> float:
        """Returns the mean over the steps since the last call; the first step's includes its compilation."""
        now, passed = time.perf_counter(), step - self._timed_step
        seconds = (now - self._time) / passed if passed else self._first_step_s
        self._time, self._timed_step = now, step
        return seconds

    @contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Excludes the time spent within from the time per step."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start


def read_metrics(path: Path) -> list[dict]:
    """Returns the records of a metrics.jsonl, without corrupt ones and those without a step."""
    return [record for record in events.read_jsonl(path) if isinstance(record.get("step"), int)]


def print_warning(text: str) -> None:
    """Prints a warning to stderr, for use without a `Log`."""
    print(f"jepax: warning: {text}", file=sys.stderr, flush=True)


def format_duration(seconds: float | int) -> str:
    """Formats a duration as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def to_json_value(value: object) -> float | list[float]:
    """Converts a metric to JSON: a number, or a list with one number per layer."""
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else [float(x) for x in array]


def _nulls_for_non_finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _nulls_for_non_finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_nulls_for_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
