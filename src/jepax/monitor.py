"""What is watched while a run trains: its metrics, its health, and its scores on held-out pictures."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jepax import guard, sharding
from jepax.data import Source, open_source
from jepax.distributed import multihost
from jepax.evals import alarms
from jepax.evals.features import FeaturesNotFinite
from jepax.evals.frozen import FrozenViT, encoder_of
from jepax.evals.health import diagnose
from jepax.evals.online import Online
from jepax.evals.watchdog import Watchdog
from jepax.events import Events
from jepax.logs import Log, Values, plain
from jepax.methods import Method
from jepax.saving import SCORE
from jepax.settings import Config
from jepax.step import told
from jepax.trees import finite
from jepax.types import Images, Metrics, UserError

NOT_LOGGED = {"verdict", "in_a_row", "grad_norm_limit"}
ROWS = {"embeddings": "embedding", "projections": "projection"}
"""Metrics with one row per image, diagnosed on the host at logged steps, and what their diagnostics begin with."""


class Diverged(UserError):
    """The loss, or the update, of a step is not finite any more."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class NotFinite(Exception):
    """As many steps in a row as the guard bears were not finite; none of them changed the state."""

    def __init__(self, step: int, images: Images, numbers: dict[str, float | str]):
        super().__init__(step)
        self.step, self.images, self.numbers = step, images, numbers


class RollBack(Exception):
    """The gradient of a step leapt, and training is to go back behind it."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Peaks:
    """The largest loss and gradient norm of any step since the last line of the log, so that no step is overlooked."""

    def __init__(self, largest: dict[str, float] | None = None) -> None:
        self.largest = dict(largest or {})

    def add(self, metrics: Metrics) -> None:
        for name in ("loss", "grad_norm"):
            value = float(metrics[name])
            if math.isfinite(value):
                self.largest[f"{name}_max"] = max(value, self.largest.get(f"{name}_max", value))

    def take(self) -> Values:
        """What was seen; from here on anew."""
        seen, self.largest = self.largest, {}
        return seen


class Monitor:
    """Looks at every step, one step late so that the device never waits for it, and writes the log's lines."""

    online: Online | None = None
    """What evaluates while the run trains."""

    def __init__(
        self, config: Config, run: Path, log: Log, events: Events, note: dict, send: Callable[[int, dict], None]
    ):
        """`note`: of the checkpoint that the run goes on from. `send`: is given every line of the log, by its step."""
        self.config, self.run, self.log, self.events, self.send = config, run, log, events, send
        self.dog, self.peaks = Watchdog(log.previous_lines), Peaks(note.get("peaks"))
        self.best: dict[str, float] = dict(note.get("best", {}))
        last = log.previous_lines[-1]["step"] + 1 if log.previous_lines else 0
        self.evaluations = last // max(config.eval.online.every, 1)
        self._waiting: tuple[int, Metrics, Images] | None = None
        alarms.write(run, self.dog.alarms)

    def took(self, step: int, metrics: Metrics, images: Images) -> None:
        """A step has begun; the one before it is looked at. Raises as `settle` does."""
        self.settle()
        self._waiting = step, metrics, images

    def settle(self) -> None:
        """Looks at the step that waits for it.

        Raises `NotFinite` and `RollBack` where the guard says so, and `Diverged` where the update is not finite.
        """
        if self._waiting is None:
            return
        (step, metrics, images), self._waiting = self._waiting, None
        verdict = int(metrics["verdict"])
        if verdict != guard.FINE:
            self._tell(step, verdict, metrics, images)
        if verdict in (guard.FINE, guard.CLIPPED) and self.writes(step) and not np.isfinite(metrics["update_norm"]):
            raise self._lost(step, f"the update's norm of step {step} is {float(metrics['update_norm'])}")
        self.peaks.add(metrics)

    def _tell(self, step: int, verdict: int, metrics: Metrics, images: Images) -> None:
        """Writes down what the guard did, and says it; raises where it cannot end with that."""
        numbers = {name: plain(metrics[name]) for name in ("loss", "grad_norm", "grad_norm_limit")}
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        if verdict == guard.OFF:  # the run goes on with less patience than it came with
            raise NotFinite(step, images, numbers)
        examples = {} if verdict == guard.CLIPPED else {"examples": np.asarray(images.index).tolist()}
        self.events.add(guard.NAMES[verdict], step, retaken=True, **numbers, **examples)
        in_a_row, patience = int(metrics["in_a_row"]), self.config.train.guard.patience
        said = f"loss {numbers['loss']:.4g}" if isinstance(numbers["loss"], float) else f"loss {numbers['loss']}"
        if verdict == guard.NOT_FINITE:
            self.log.print(
                f"warning: step {step} is not finite ({said}, gradient norm {numbers['grad_norm']}): it changed"
                f" nothing;"
                f" {in_a_row} in a row, {patience} end the run"
            )
            if in_a_row >= patience:
                raise NotFinite(step, images, numbers)
            return
        self.log.print(
            f"warning: gradient spike at step {step}: norm {numbers['grad_norm']:.3g}, and"
            f" {self.config.train.guard.factor:g} times the usual is {numbers['grad_norm_limit']:.3g}:"
            f" {guard.NAMES[verdict]}"
        )
        if verdict == guard.ROLL_BACK:
            raise RollBack(step)

    def refuse_not_finite(self, step: int, method: Method) -> None:
        """Raises `Diverged` where a step gave parameters that are not finite: before they are saved."""
        if not finite(method):
            raise self._lost(step, f"parameters are not finite after step {step}")

    def _lost(self, step: int, what: str) -> Diverged:
        return self.ended(
            step,
            f"{what}: training stopped, nothing was saved after it;\n"
            "try a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.clip=1.0",
        )

    def writes(self, step: int) -> bool:
        """Whether the step gets a line."""
        return told(step, self.config.train.log_every, self.log.steps)

    def line(self, step: int, metrics: Metrics, method: Method) -> bool:
        """Writes the step's line, with scores where they are due. Returns whether the state is the best so far."""
        self.settle()
        batch, every = self.config.train.batch_size, self.config.eval.online.every
        values = log_values(metrics, self.log.seconds_per_step(step), batch) | self.peaks.take()
        if self.online is not None and (step + 1) // every > self.evaluations:
            self.evaluations = (step + 1) // every
            with self.log.pause_timer():
                values |= self._scores(step, method)
        written = self.log.write(step, values)
        self.send(step, written)
        self._warn(written)
        name = self.config.train.save.best
        if name not in values:
            return False
        best = bool(multihost.broadcast(int(values[name] > self.best.get(name, -math.inf))))
        if best:
            self.best[name] = values[name]
        return best

    def _warn(self, line: dict) -> None:
        """Lets the watchdog see a line; what it says goes to the terminal and into `run`/health.json."""
        new = self.dog.see(line)
        for alarm in new:
            self.log.print(f"warning: {alarm}; try {alarm.advice}")
        if new:
            alarms.write(self.run, self.dog.alarms)

    def ended(self, step: int, message: str) -> Diverged:
        """The error that ends the run; `run`/health.json tells it, and what the watchdog makes of the steps before."""
        self.dog.see({"step": step, **self.peaks.take()})
        alarms.write(self.run, self.dog.alarms, ended=message.splitlines()[0])
        return Diverged(step, message)

    def _scores(self, step: int, method: Method) -> Values:
        """Of the method after `step`, and the seconds that they took. Raises `Diverged` where there are none."""
        start = time.perf_counter()
        try:
            found = self.online(evaluated(self.config, method))
        except FeaturesNotFinite as error:
            raise self.ended(step, f"after step {step} {error}") from error
        return found | {"online_seconds": time.perf_counter() - start}

    def note(self, best: bool) -> dict:
        """What a checkpoint must hold beside the arrays, so that a run that goes on from it writes the same lines."""
        now = {"peaks": dict(self.peaks.largest), "best": dict(self.best)}
        name = self.config.train.save.best
        return now | ({SCORE: {name: self.best[name]}} if best else {})


def log_values(metrics: Metrics, seconds_per_step: float, batch_size: int) -> Values:
    """A step's metrics as they are logged."""
    values = {name: plain(value) for name, value in metrics.items() if name not in NOT_LOGGED.union(ROWS)}
    for name, prefix in ROWS.items():
        rows = sharding.whole(metrics[name]) if name in metrics else None
        if rows is not None and np.isfinite(rows).all():  # the guard has seen to the step; its rows say nothing
            values |= diagnose(rows, prefix)
    return values | {"seconds_per_step": seconds_per_step, "images_per_second": batch_size / seconds_per_step}


def online_of(config: Config, train: Source, steps: int) -> Online | None:
    """What evaluates during training, if it ever does. The test split is not opened."""
    if not 0 < config.eval.online.every <= steps:
        return None
    reading = {"threads": config.data.threads, "workers": config.data.workers}
    validation = open_source(config.data, "validation")
    return Online(config.eval.online, train, validation, config.eval.batch_size, **reading)


def evaluated(config: Config, method: Method) -> FrozenViT:
    """The encoder that the run's evaluations read, for this process alone: each evaluates the same pictures."""
    encoder = sharding.local(encoder_of(method, config.eval.encoder))
    return FrozenViT(encoder, config.method.crop, config.eval.pool)
