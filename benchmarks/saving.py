"""The cost of dependability: the guard in every step, and a checkpoint with its manifest while training goes on.

    python benchmarks/saving.py [--quick] [--json FILE]

Steps with and without the guard run in turn, and so do rounds of steps with and without a checkpoint that is written
meanwhile. See README.md in this folder.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from jepax.distributed.malloc import tune_malloc

tune_malloc()  # as the command line does, and before jax starts threads

# ruff: noqa: E402
import jax

from jepax.bench.machine import describe_machine
from jepax.data import DataConfig
from jepax.distributed import sharding
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.io.checkpointer import CheckpointManager
from jepax.recipes import RECIPES
from jepax.training import step as train_steps
from jepax.training.config import Config
from jepax.training.setup import make_setup
from jepax.training.step import TrainState, train_step
from jepax.trees import global_norm
from jepax.types import Metrics


def config_of(name: str, batch: int, side: int, quick: bool) -> Config:
    """A recipe on generated images, in batches for two cores."""
    config = RECIPES[name]()
    channels = config.method.encoder.in_channels
    data = DataConfig(dataset="synthetic", canvas_size=side, channels=channels, synthetic_size=512)
    train = dataclasses.replace(config.train, batch_size=8 if quick else batch, steps=100_000)
    return dataclasses.replace(config, data=data, train=train)


class Training:
    """A state, and our step with its guard ("guarded") and without ("bare"), which advances it."""

    def __init__(self, config: Config):
        setup = make_setup(config)
        self.state, self.base_key, self.context = setup.init_state(), setup.base_key, setup.context
        self.batch = sharding.shard_batch(next(setup.batches(steps=1)), setup.plan.mesh)
        self.programs = {"guarded": self.program(lambda *args: train_step(*args, self.context))}
        self.programs["bare"] = self.program(lambda *args: bare_train_step(*args, self.context))

    @staticmethod
    def program(function: Callable[..., tuple[TrainState, Metrics]]) -> Callable[..., tuple[TrainState, Metrics]]:
        """Compile a step that donates its state."""
        return jax.jit(function, donate_argnums=0, compiler_options=COMPILER_OPTIONS)

    def take(self, name: str = "guarded") -> float:
        """Run a step; return its seconds."""
        start = time.perf_counter()
        self.state, metrics = self.programs[name](self.state, self.batch, self.base_key)
        float(metrics["train/loss"])
        return time.perf_counter() - start


def bare_train_step(*args: Any) -> tuple[TrainState, Metrics]:
    """`train_step` without a guard: every update is applied. The gradient's norm stays, since it is logged anyway."""

    def unguarded(update: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, grads, *, guard, **_: (
            update(state, grads),
            guard,
            {"optim/grad_norm": global_norm(grads)},
        )

    with mock.patch.object(train_steps, "guarded", unguarded):
        return train_step(*args)


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
    seconds_by_name = {f"{name}_step_s": value for name, value in medians.items()}
    quartiles = [pairs[len(pairs) // 4], pairs[-len(pairs) // 4]]
    return seconds_by_name | {"ratio": medians["guarded"] / medians["bare"], "quartiles_of_pairs": quartiles}


def with_checkpoint(config: Config, training: Training, window: float, rounds: int) -> dict[str, Any]:
    """Measure the seconds that a checkpoint costs a run: how much longer the same steps take while it is written."""
    count, blocked, extra, size = max(round(window / training.take()), 2), [], [], 0
    folder = Path(tempfile.mkdtemp(prefix="jepax-", dir="."))
    try:
        for turn in range(rounds):
            took = {}
            for saving in (False, True) if turn % 2 else (True, False):
                with CheckpointManager(
                    folder, dataclasses.replace(config.train.checkpoint, max_to_keep=1), print
                ) as saver:
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


def fractions(config: Config, guarded: dict[str, Any], written: dict[str, Any]) -> dict[str, float]:
    """Fractions of training time: the guard's, the checkpoints' at the recipe's own settings, and both."""
    save, step = config.train.checkpoint, guarded["bare_step_s"]
    between = min(save.every_steps * step, 60 * (save.every_minutes or float("inf")))
    checks, saves = guarded["ratio"] - 1, written["costs_s"] / between
    return {"seconds_between_checkpoints": between, "guard": checks, "checkpoints": saves, "together": checks + saves}


CASES = {"demo": ("ijepa_fashion_mnist", 128, 28, 60, 6.0), "vitb16": ("ijepa_vitb16_in1k", 4, 224, 12, 30.0)}
"""Recipe, batch, side of the images; rounds of steps; seconds of steps while a checkpoint is written."""


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
        written = with_checkpoint(config, training, *((0.1, 1) if args.quick else (window, 5)))
        results[name] = {"guard": guarded, "checkpoint": written, "share": fractions(config, guarded, written)}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
