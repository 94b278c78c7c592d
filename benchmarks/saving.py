"""What dependability costs: the guard in every step, and a checkpoint with its manifest while training goes on.

    python benchmarks/saving.py [--quick] [--json FILE]

Steps with and without the guard are taken in turn; and rounds of steps with and without a checkpoint beside them.
See README.md beside this file.
"""

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jepax.distributed.malloc import tune_malloc

tune_malloc()  # as the command line does, and before jax starts threads

# ruff: noqa: E402
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from jepax.bench.environment import describe_machine
from jepax.data import DataConfig
from jepax.distributed import sharding
from jepax.io.checkpointer import CheckpointManager
from jepax.recipes import RECIPES
from jepax.training import grad_guard
from jepax.training import step as steps
from jepax.training.config import Config, setup_data_and_optimizer
from jepax.training.loop import train_batches
from jepax.training.step import DEFAULT_GUARD, TrainState, first_state
from jepax.types import Metrics


def config_of(name: str, batch: int, side: int, quick: bool) -> Config:
    """A recipe on made pictures, in batches that two cores can take."""
    config = RECIPES[name]()
    channels = config.method.encoder.channels
    data = DataConfig(source="synthetic", canvas=side, channels=channels, synthetic_images=512)
    train = dataclasses.replace(config.train, batch_size=8 if quick else batch, steps=100_000)
    return dataclasses.replace(config, data=data, train=train)


class Training:
    """A state, and our step with its guard and without, which takes it on."""

    def __init__(self, config: Config):
        source, self.optimizer = setup_data_and_optimizer(config)
        mesh = sharding.make_mesh()
        self.root = sharding.replicate(jr.key(1), mesh)
        self.images = sharding.shard_batch(next(train_batches(config, source, 1, 0)), mesh)
        state = sharding.replicate(first_state(config.method, self.optimizer, jr.key(0)), mesh)
        self.arrays, self.rest = eqx.partition(state, eqx.is_array)
        guarded, bare = (lambda arrays: self.raw(arrays) for _ in range(2))  # two, since one would be traced once
        self.programs = {"guarded": jax.jit(guarded, donate_argnums=0), "bare": jax.jit(bare, donate_argnums=0)}

    @property
    def state(self) -> TrainState:
        return eqx.combine(self.arrays, self.rest)

    def raw(self, arrays: Any) -> tuple[Any, Metrics]:
        state = eqx.combine(arrays, self.rest)
        new, metrics = steps.train_step(self.optimizer, state, self.images, self.root, jnp.float32, DEFAULT_GUARD)
        return eqx.filter(new, eqx.is_array), metrics

    def take(self, name: str = "guarded") -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        with unguarded() if name == "bare" else contextlib.nullcontext():
            self.arrays, metrics = self.programs[name](self.arrays)
        float(metrics["loss"])
        return time.perf_counter() - start


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Within, a step that is traced takes every update and judges nothing."""
    kept = steps.apply_if, grad_guard.GradGuardState.judge, grad_guard.GradGuardState.scale
    steps.apply_if = lambda condition, update, old: update(old)
    grad_guard.GradGuardState.judge, grad_guard.GradGuardState.scale = (
        lambda *_: jnp.int32(grad_guard.FINE),
        lambda *_: 1.0,
    )
    try:
        yield
    finally:
        steps.apply_if, grad_guard.GradGuardState.judge, grad_guard.GradGuardState.scale = kept


def in_turn(training: Training, rounds: int) -> dict[str, Any]:
    """Median seconds of a step with the guard and without, and their ratio."""
    times: dict[str, list[float]] = {name: [] for name in training.programs}
    for turn in range(rounds + 2):
        for name in sorted(times, reverse=bool(turn % 2)):
            seconds = training.take(name)
            if turn > 1:  # the first ones compile
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = sorted(a / b for a, b in zip(times["guarded"], times["bare"], strict=True))
    told = {f"{name}_step_s": value for name, value in medians.items()}
    quartiles = [pairs[len(pairs) // 4], pairs[-len(pairs) // 4]]
    return told | {"ratio": medians["guarded"] / medians["bare"], "quartiles_of_pairs": quartiles}


def beside(config: Config, training: Training, window: float, rounds: int) -> dict[str, Any]:
    """Seconds that one checkpoint costs a run: how much longer the same steps take while it is written."""
    count, blocked, extra, size = max(round(window / training.take()), 2), [], [], 0
    folder = Path(tempfile.mkdtemp(prefix="jepax-", dir="."))
    try:
        for turn in range(rounds):
            took = {}
            for saving in (False, True) if turn % 2 else (True, False):
                with CheckpointManager(folder, dataclasses.replace(config.train.save, keep=1), print) as saver:
                    start = time.perf_counter()
                    if saving:
                        saver.save(turn + 1, training.state, {})
                        blocked.append(time.perf_counter() - start)
                    for _ in range(count):
                        training.take()
                    saver.wait()
                    took[saving] = time.perf_counter() - start
            extra.append(took[True] - took[False])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    return {
        "megabytes": size / 1e6,
        "steps_beside_it": count,
        "blocks_training_s": statistics.median(blocked),
        "costs_s": statistics.median(extra),
        "each_costs_s": extra,
    }


def share(config: Config, guarded: dict[str, Any], written: dict[str, Any]) -> dict[str, float]:
    """Of the time of training: the guard's, the checkpoints' at the recipe's own settings, and both."""
    save, step = config.train.save, guarded["bare_step_s"]
    between = min(save.every * step, 60 * (save.minutes or float("inf")))
    checks, saves = guarded["ratio"] - 1, written["costs_s"] / between
    return {"seconds_between_checkpoints": between, "guard": checks, "checkpoints": saves, "together": checks + saves}


CASES = {"demo": ("ijepa_fashion_mnist", 128, 28, 60, 6.0), "vitb16": ("ijepa_vitb16_in1k", 4, 224, 12, 30.0)}
"""Recipe, batch, side of the pictures; rounds of steps; seconds of steps beside a checkpoint."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the demo alone, few rounds: only to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine()}
    for name, (recipe, batch, side, rounds, window) in list(CASES.items())[: 1 if args.quick else None]:
        config = config_of(recipe, batch, side, args.quick)
        training = Training(config)
        guarded = in_turn(training, 3 if args.quick else rounds)
        written = beside(config, training, *((0.1, 1) if args.quick else (window, 5)))
        results[name] = {"guard": guarded, "checkpoint": written, "share": share(config, guarded, written)}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
