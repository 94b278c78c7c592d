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


class Log:
    """A run's metrics file, its progress in the terminal, and the time per step; a context manager.

    `previous_lines`: the records of earlier commands. A resumed run drops corrupt lines, and the steps that it repeats.
    """

    def __init__(self, path: Path, *, steps: int, start: int):
        self.path, self.steps, self.start, self._printed = path, steps, start, 0.0
        main = multihost.is_main_process()
        self.console = Console(stderr=True, quiet=not main)
        speed, left = TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, left
        self.progress = Progress(*columns, console=self.console, disable=not (main and self.console.is_terminal))

    def __enter__(self) -> "Log":
        corrupt = events.count_corrupt_lines(self.path)
        self.previous_lines = [record for record in read_metrics(self.path) if record["step"] < self.start]
        if main := multihost.is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            events.rewrite_jsonl(self.path, self.previous_lines)
        self._file = (self.path if main else Path(os.devnull)).open("a", buffering=1)
        if corrupt:
            self.print(f"warning: {self.path}: {corrupt} lines that a crash corrupted are dropped")
        self.progress.start()
        self._task = self.progress.add_task("training", total=self.steps, completed=self.start, speed="")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        try:
            with atomic.with_path_in_error(self.path):
                self._file.close()
        except OSError:  # `write` has raised it already
            if kind is None:
                raise

    def write(self, step: int, values: MetricValues) -> dict:
        """Append a record to metrics.jsonl, show the loss and the speed, and return the record.

        Values that are not finite become null, as strict JSON has no others.
        """
        record = _nulls_for_non_finite({"step": step, **values})
        with atomic.with_path_in_error(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        speed = f"loss {values['train/loss']:.4f}  {values['perf/images_per_sec']:.0f} examples/s"
        if "perf/tflops" in values:
            mfu = f" ({100 * values['perf/mfu']:.0f}% MFU)" if "perf/mfu" in values else ""
            speed += f"  {values['perf/tflops']:.3g} TFLOP/s{mfu}"
        self.progress.update(self._task, speed=speed)
        if self.progress.disable and (time.monotonic() - self._printed > PRINT_EVERY_S or step + 1 == self.steps):
            self._printed = time.monotonic()
            # The first step's time is mostly compilation: it predicts nothing.
            left = (self.steps - step - 1) * values["perf/step_time"]
            left = f"  {format_duration(left)} left" if step > self.start else ""
            self.print(f"step {step + 1}/{self.steps}  {speed}{left}")
        return record

    def print(self, text: str) -> None:
        """Print text above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def set_progress(self, step: int) -> None:
        """Advance the progress bar to `step`."""
        self.progress.update(self._task, completed=step + 1)

    def print_header(self, run: Path, batch_size: int, layout: str) -> None:
        """Print the run's header, and start the timer."""
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        sharded = f", {layout}" if jax.device_count() > 1 else ""
        resumed = f", continuing after step {self.start}" if self.start else ""
        self.print(f"{run}: {self.steps} steps of {batch_size} examples on {where}{sharded}{resumed}")
        self._time, self._timed_step = time.perf_counter(), self.start

    def report_compile_time(self, loss: jax.Array) -> None:
        """Wait for the first step, print its time, and restart the timer."""
        loss.block_until_ready()
        self._first_step_s = time.perf_counter() - self._time
        self.print(f"compiled and ran the first step in {self._first_step_s:.1f} s")
        self._time, self._timed_step = time.perf_counter(), self.start

    def seconds_per_step(self, step: int) -> float:
        """The mean over the steps since the last call; the first step's includes its compilation."""
        now, passed = time.perf_counter(), step - self._timed_step
        seconds = (now - self._time) / passed if passed else self._first_step_s
        self._time, self._timed_step = now, step
        return seconds

    @contextmanager
    def pause_timer(self) -> Iterator[None]:
        """Exclude the time spent within from the time per step."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without corrupt ones and those without a step."""
    return [record for record in events.read_jsonl(path) if isinstance(record.get("step"), int)]


def print_warning(text: str) -> None:
    """Print a warning to stderr, for use without a `Log`."""
    print(f"jepax: warning: {text}", file=sys.stderr, flush=True)


def format_duration(seconds: float | int) -> str:
    """Format a duration as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def to_json_value(value: object) -> float | list[float]:
    """Convert a metric to JSON: a number, or a list with one number per layer."""
    return np.asarray(value, np.float64).tolist()


def _nulls_for_non_finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _nulls_for_non_finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_nulls_for_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
