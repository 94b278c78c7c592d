"""What is measured: a recipe's step, as `jepax train` compiles it, on a batch of its own pictures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jepax.bench.breakdown import time_by_verb
from jepax.bench.memory import peak_bytes, reset_peak
from jepax.bench.timing import WARMUP_CALLS, percentiles
from jepax.distributed import sharding
from jepax.distributed.malloc import trim_heap
from jepax.training.dry_run import step_flops
from jepax.training.setup import Setup
from jepax.training.step import jit_train_step, run_train_step
from jepax.types import Metrics

AHEAD = 2
"""Steps that are under way at once, as in training."""


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
        with kept_in(folder):
            for name in ("cold", "warm"):
                jax.clear_caches()
                start = time.perf_counter()
                lowered = jit_train_step.lower(self.state, self.batch, self.base_key, self.setup.context)
                traced = time.perf_counter()
                program = lowered.compile()
                found |= {f"trace_{name}_s": traced - start, f"compile_{name}_s": time.perf_counter() - traced}
            jax.block_until_ready(self.step())  # the step's own program comes from there too
        memory = program.memory_analysis()
        taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return found | {"program_bytes": float(taken + memory.output_size_in_bytes - memory.alias_size_in_bytes)}

    def steps(self, rounds: int) -> dict[str, Any]:
        """Seconds of single steps, and images per second of steps that follow each other, as in training."""
        for _ in range(WARMUP_CALLS):
            jax.block_until_ready(self.step())
        trim_heap()
        reset_peak()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(self.step())
            times.append(time.perf_counter() - start)
        under_way: list[Metrics] = []
        for _ in range(AHEAD):
            under_way = self.followed(under_way, self.step())
        start, begun = time.perf_counter(), unfinished(under_way)
        for _ in range(rounds):
            under_way = self.followed(under_way, self.step())
        jax.block_until_ready(under_way)
        each = (time.perf_counter() - start) / (rounds + begun)
        batch = self.config.train.batch_size
        found = {"step_s": percentiles(times), "pipelined_step_s": each, "images_per_s": batch / each}
        return found | {"peak_bytes": peak_bytes(), "programs": jit_train_step._cache_size()}

    @staticmethod
    def followed(under_way: list[Metrics], metrics: Metrics) -> list[Metrics]:
        """The steps that are under way once the new one is: as in training, it waits for the one before it."""
        under_way = [*under_way, metrics][-AHEAD:]
        under_way[0]["loss"].block_until_ready()
        return under_way

    def with_input(self, rounds: int) -> dict[str, float]:
        """The same steps on batches as they are read, and the share of the time that the step waits for them."""
        config, mesh = self.config, self.setup.plan.mesh
        stream = self.setup.batches(steps=WARMUP_CALLS + rounds)
        waited, under_way = 0.0, []
        for number in range(WARMUP_CALLS + rounds):
            if number == WARMUP_CALLS:
                start, begun, waited = time.perf_counter(), unfinished(under_way), 0.0
            before = time.perf_counter()
            images = sharding.shard_batch(next(stream), mesh)
            idle = not unfinished(under_way)
            waited += (time.perf_counter() - before) if idle else 0.0
            under_way = self.followed(under_way, self.step(images))
        jax.block_until_ready(under_way)
        whole = time.perf_counter() - start
        images_per_s = (rounds + begun) * config.train.batch_size / whole
        return {"images_per_s": images_per_s, "waited_share": waited / whole}

    def parts(self, rounds: int) -> dict[str, float]:
        """Seconds of a step by part; they add up to the step's. See `breakdown.py`."""
        return time_by_verb(self, rounds)

    def utilisation(self, step_s: float, peak: float) -> dict[str, float]:
        """Arithmetic of the step's matrix products per second and device, over the peak."""
        flops = step_flops(self.setup) * self.config.train.batch_size / jax.device_count()
        return {
            "gflop_per_image": step_flops(self.setup) / 1e9,
            "tflop_per_s": flops / step_s / 1e12,
            "peak_tflop_per_s": peak / 1e12,
            "utilisation": flops / step_s / peak,
        }


def unfinished(under_way: list[Metrics]) -> int:
    """How many of these steps are not done."""
    return sum(not metrics["loss"].is_ready() for metrics in under_way)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within, every program is kept in this folder, and none is looked for elsewhere."""
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        update(wanted)
        yield
    finally:
        update(before)


def update(settings: dict[str, Any]) -> None:
    """Of JAX's cache of programs."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
