"""What is watched while a run trains: its metrics, its health, and its scores on held-out pictures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Array

from jepax.data import Source, open_source
from jepax.evals import alarms
from jepax.evals.frozen import FrozenViT, encoder_of
from jepax.evals.health import diagnose
from jepax.evals.online import Online
from jepax.evals.watchdog import Watchdog
from jepax.logs import Log, Values, plain
from jepax.methods import AbstractMethod
from jepax.settings import Config
from jepax.types import Metrics, UserError

ROWS = {"embeddings": "embedding", "projections": "projection"}
"""Metrics with one row per image, diagnosed on the host at logged steps, and what their diagnostics begin with."""


class Diverged(UserError):
    """The loss, or the update, of a step is not finite any more."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


def refuse_not_finite(step: int, metrics: Metrics) -> None:
    """Raises `Diverged` naming the step. The state after it is lost, so nothing of it is saved."""
    for name, what in (("loss", "loss"), ("update_norm", "update's norm")):
        if not np.isfinite(metrics[name]):
            raise Diverged(
                step,
                f"the {what} of step {step} is {float(metrics[name])}: training stopped, nothing was saved after it;\n"
                "try a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.clip=1.0",
            )


class Peaks:
    """The largest loss and gradient norm of any step since the last line of the log, so that no step is overlooked."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        for name in ("loss", "grad_norm"):
            value = float(metrics[name])
            self.largest[f"{name}_max"] = max(value, self.largest.get(f"{name}_max", value))

    def take(self) -> Values:
        """What was seen; from here on anew."""
        seen, self.largest = self.largest, {}
        return seen


@contextmanager
def guarded(run: Path, dog: Watchdog, peaks: Peaks) -> Iterator[None]:
    """Within, `run`/health.json holds what the watchdog has said; if training diverges, that and its prelude too."""
    alarms.write(run, dog.alarms)
    try:
        yield
    except Diverged as error:
        dog.see({"step": error.step, **peaks.take()})
        alarms.write(run, dog.alarms, ended=str(error).splitlines()[0])
        raise


def warn(log: Log, run: Path, dog: Watchdog, line: dict) -> None:
    """Lets the watchdog see a line; what it says goes to the terminal and into `run`/health.json."""
    new = dog.see(line)
    for alarm in new:
        log.say(f"warning: {alarm}; try {alarm.advice}")
    if new:
        alarms.write(run, dog.alarms)


def log_values(metrics: Metrics, seconds_per_step: float, batch_size: int) -> Values:
    """A step's metrics as they are logged."""
    values = {name: plain(value) for name, value in metrics.items() if name not in ROWS}
    for name, prefix in ROWS.items():
        if name in metrics:
            values |= diagnose(local_rows(metrics[name]), prefix)
    return values | {"seconds_per_step": seconds_per_step, "images_per_second": batch_size / seconds_per_step}


def local_rows(array: Array) -> np.ndarray:
    """This host's share of an array over the batch."""
    return np.concatenate([shard.data for shard in array.addressable_shards if shard.replica_id == 0])


def online_of(config: Config, train: Source, steps: int) -> Online | None:
    """What evaluates during training, if it ever does. The test split is not opened."""
    if not 0 < config.eval.online.every <= steps:
        return None
    reading = {"threads": config.data.threads, "workers": config.data.workers}
    validation = open_source(config.data, "validation")
    return Online(config.eval.online, train, validation, config.eval.batch_size, **reading)


def online_scores(online: Online, config: Config, step: int, method: AbstractMethod) -> Values:
    """The scores of the method after `step`, and the seconds that they took. Raises `Diverged` where there are none."""
    start = time.perf_counter()
    try:
        found = online(evaluated(config, method))
    except UserError as error:
        raise Diverged(step, f"after step {step} {error}") from error
    return found | {"online_seconds": time.perf_counter() - start}


def evaluated(config: Config, method: AbstractMethod) -> FrozenViT:
    """The encoder that the run's evaluations read."""
    return FrozenViT(encoder_of(method, config.eval.encoder), config.method.crop, config.eval.pool)
