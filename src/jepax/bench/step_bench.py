"""Measures a recipe's step, as `jepax train` compiles it, on a batch of its own images."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jepax.bench.breakdown import time_by_verb
from jepax.bench.memory import peak_bytes, reset_peak
from jepax.bench.timing import WARMUP_CALLS, percentiles, time_call
from jepax.distributed import sharding
from jepax.distributed.malloc import trim_heap
from jepax.training.dry_run import flops_by_verb
from jepax.training.setup import Setup
from jepax.training.step import jit_train_step, run_train_step
from jepax.types import Metrics

MAX_IN_FLIGHT = 2
"""Most steps that run or wait on the device at the same time, as in training."""


class StepBenchmark:
    """A run's state and one batch on the devices."""

    def __init__(self, setup: Setup):
        self.setup, self.config = setup, setup.config
        self.state, self.base_key = setup.init_state(), setup.base_key
        self.batch = sharding.shard_batch(next(setup.batches(steps=1)), setup.plan.mesh)

    def step(self, batch: Any = None) -> Metrics:
        """Start one training step, and return its metrics, which may not be ready."""
        batch = self.batch if batch is None else batch
        self.state, metrics = run_train_step(self.state, batch, self.base_key, self.setup.context)
        return metrics

    def compile(self, folder: Path) -> dict[str, float]:
        """Seconds to trace and compile the step with an empty compilation cache in `folder`, and again with a full one;
        then bytes per device that the program reserves."""
        found: dict[str, float] = {}
        with compile_cache_at(folder):
            for name in ("cold", "warm"):
                jax.clear_caches()
                start = time.perf_counter()
                lowered = jit_train_step.lower(self.state, self.batch, self.base_key, self.setup.context)
                traced = time.perf_counter()
                program = lowered.compile()
                found |= {f"trace_{name}_s": traced - start, f"compile_{name}_s": time.perf_counter() - traced}
            jax.block_until_ready(self.step())  # the program of `step` comes from the cache, too
        memory = program.memory_analysis()
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        return found | {"program_bytes": float(total - memory.alias_size_in_bytes)}

    def steps(self, rounds: int) -> dict[str, Any]:
        """Seconds of single steps, and images per second of steps that follow each other, as in training."""
        for _ in range(WARMUP_CALLS):
            jax.block_until_ready(self.step())
        trim_heap()
        reset_peak()

        # One step at a time.
        times = [time_call(self.step) for _ in range(rounds)]

        # One after the other. Steps that started before the clock and end after it count, too.
        in_flight: list[Metrics] = []
        for _ in range(MAX_IN_FLIGHT):
            in_flight = throttle(in_flight, self.step())
        start, pending = time.perf_counter(), count_pending(in_flight)
        for _ in range(rounds):
            in_flight = throttle(in_flight, self.step())
        jax.block_until_ready(in_flight)
        seconds = (time.perf_counter() - start) / (rounds + pending)
        images_per_s = self.config.train.batch_size / seconds
        found = {"step_s": percentiles(times), "step_s_pipelined": seconds, "images_per_s": images_per_s}
        return found | {"peak_bytes": peak_bytes(), "programs": jit_train_step._cache_size()}

    def with_input(self, rounds: int) -> dict[str, float]:
        """The same steps on batches as they are read: images per second, and the fraction of time that the device waits
        for a batch."""
        stream = self.setup.batches(steps=WARMUP_CALLS + rounds)
        waited, in_flight = 0.0, []
        for number in range(WARMUP_CALLS + rounds):
            if number == WARMUP_CALLS:
                start, pending, waited = time.perf_counter(), count_pending(in_flight), 0.0
            before = time.perf_counter()
            batch = sharding.shard_batch(next(stream), self.setup.plan.mesh)
            if not count_pending(in_flight):
                waited += time.perf_counter() - before
            in_flight = throttle(in_flight, self.step(batch))
        jax.block_until_ready(in_flight)
        seconds = time.perf_counter() - start
        images_per_s = (rounds + pending) * self.config.train.batch_size / seconds
        return {"images_per_s": images_per_s, "input_wait_fraction": waited / seconds}

    def parts(self, rounds: int) -> dict[str, float]:
        """Seconds of each part of a step; they add up to the step's. See `breakdown.py`."""
        return time_by_verb(self, rounds)

    def utilization(self, step_s: float, peak: float) -> dict[str, float]:
        """FLOP/s per device of the step's matrix products, and their fraction of the peak."""
        per_image = flops_by_verb(self.setup)["step"]
        flops = per_image * self.config.train.batch_size / jax.device_count()
        return {
            "gflop_per_image": per_image / 1e9,
            "tflop_per_s": flops / step_s / 1e12,
            "peak_tflop_per_s": peak / 1e12,
            "utilization": flops / step_s / peak,
        }


def throttle(in_flight: list[Metrics], metrics: Metrics) -> list[Metrics]:
    """Add a step to those in flight. As in training, the host then waits for the step before it."""
    in_flight = [*in_flight, metrics][-MAX_IN_FLIGHT:]
    in_flight[0]["train/loss"].block_until_ready()
    return in_flight


def count_pending(in_flight: list[Metrics]) -> int:
    """Number of these steps that are not done."""
    return sum(not metrics["train/loss"].is_ready() for metrics in in_flight)


@contextmanager
def compile_cache_at(folder: Path) -> Iterator[None]:
    """Within the context, every program is cached in this folder, and none is read from elsewhere."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        update_cache_settings(settings)
        yield
    finally:
        update_cache_settings(before)


def update_cache_settings(settings: dict[str, Any]) -> None:
    """Change settings of JAX's compilation cache, which reads them once."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
