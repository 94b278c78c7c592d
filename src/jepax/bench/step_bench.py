"""Measures a recipe's step, as `jepax train` compiles it, on a batch of its own images."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jepax.bench.machine import peak_memory, reset_peak_memory
from jepax.bench.timing import WARMUP_CALLS, interleave, percentiles, time_call
from jepax.distributed import sharding
from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.distributed.malloc import trim_heap
from jepax.methods.base import Method, example_keys, objective_key
from jepax.training.dry_run import flops_by_verb
from jepax.training.setup import Setup
from jepax.training.step import jit_train_step, loss_and_grads, run_train_step
from jepax.trees import cast
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
        reset_peak_memory()
        times = [time_call(self.step) for _ in range(rounds)]
        seconds, _ = self._pipeline(itertools.repeat(None), rounds)
        return {
            "step_s": percentiles(times),
            "step_s_pipelined": seconds,
            "images_per_s": self.config.train.batch_size / seconds,
            "peak_bytes": peak_memory(),
            "programs": jit_train_step._cache_size(),
        }

    def with_input(self, rounds: int) -> dict[str, float]:
        """The same steps on batches as they are read: images per second, and the fraction of time that the device waits
        for a batch."""
        stream = self.setup.batches(steps=MAX_IN_FLIGHT + rounds)
        seconds, waiting = self._pipeline((sharding.shard_batch(b, self.setup.plan.mesh) for b in stream), rounds)
        return {"images_per_s": self.config.train.batch_size / seconds, "input_wait_fraction": waiting}

    def _pipeline(self, batches: Iterator[Any], rounds: int) -> tuple[float, float]:
        """Mean seconds of steps that follow each other, and the fraction of time that the device waits for a batch."""
        in_flight: list[Metrics] = []
        for number in range(MAX_IN_FLIGHT + rounds):
            # Steps that started before the clock and end after it count, too.
            if number == MAX_IN_FLIGHT:
                start, pending, waited = time.perf_counter(), count_pending(in_flight), 0.0
            before = time.perf_counter()
            batch = next(batches)
            if number >= MAX_IN_FLIGHT and not count_pending(in_flight):
                waited += time.perf_counter() - before

            # As in training, the host waits for the step before the one that it starts.
            in_flight = [*in_flight, self.step(batch)][-MAX_IN_FLIGHT:]
            in_flight[0]["train/loss"].block_until_ready()
        jax.block_until_ready(in_flight)
        seconds = time.perf_counter() - start
        return seconds / (rounds + pending), waited / seconds

    def parts(self, rounds: int) -> dict[str, float]:
        """Median seconds by part, in the order of the step; they add up to the step's.

        Each part is a separate program, so XLA's fusion across parts is not measured. `backward` is the gradient's time
        minus that of the parts before it, `optimizer and teacher` (with the guard and the norms) the step's minus the
        gradient's; both are below 0 if the clock is too coarse.
        """
        setup, batch, key = self.setup, self.batch, jr.fold_in(self.setup.base_key, 0)
        context = setup.context
        method = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, self.state.method)  # steps donate theirs

        def program(function: Callable[..., Any]) -> Callable[..., Any]:
            return eqx.filter_jit(compiler_options=COMPILER_OPTIONS)(function)

        def computed(method: Method) -> Method:
            return sharding.gather_params(cast(method, context.compute_dtype), context.plan)

        draw = program(lambda m, b, k: m.draw(b, example_keys(k, b.index)))
        forward = program(lambda m, v: computed(m).forward(v))
        objective = program(lambda m, o, k: computed(m).objective(o, key=objective_key(k))[0])
        gradient = program(lambda m, b, k: loss_and_grads(m, b, k, context))
        views = draw(method, batch, key)
        outputs = forward(method, views)
        calls = {
            "draw": lambda: draw(method, batch, key),
            "forward": lambda: forward(method, views),
            "objective": lambda: objective(method, outputs, key),
            "gradient": lambda: gradient(method, batch, key),
            "step": self.step,
        }
        times = {name: float(np.median(values)) for name, values in interleave(calls, rounds).items()}
        parts = {name: times[name] for name in ("draw", "forward", "objective")}
        return parts | {
            "backward": times["gradient"] - sum(parts.values()),
            "optimizer and teacher": times["step"] - times["gradient"],
        }

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

    def update(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX reads these settings once

    before = {name: getattr(jax.config, name) for name in settings}
    try:
        update(settings)
        yield
    finally:
        update(before)
