"""What is measured: a recipe's step, as `jepax train` compiles it, on a batch of its own pictures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
from jax.experimental.compilation_cache import compilation_cache

from jepax import sharding
from jepax.bench.clock import WARM, percentiles
from jepax.bench.memory import forget_peak, peak_bytes
from jepax.distributed.malloc import trim_heap
from jepax.dryrun import Plan, step_flops
from jepax.settings import compute_dtype
from jepax.step import Fixed, compiled_step, placed_state, step_program
from jepax.train import read
from jepax.types import Images, Metrics

AHEAD = 2
"""Steps that are under way at once, as in training."""


class Subject:
    """A run's state and one batch on the devices."""

    def __init__(self, plan: Plan):
        self.plan, self.config = plan, plan.config
        config, layout = plan.config, plan.layout
        self.state = placed_state(config.method, plan.optimizer, jr.key(config.seed), layout)
        root = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), layout.mesh)
        self.fixed = Fixed(
            plan.optimizer, root, compute_dtype(config), config.train.guard, layout, config.train.log_every
        )
        (first,) = read(config, plan.source, 1, 0)
        self.images = sharding.shard_batch(first, layout.mesh)

    def step(self, images: Images | None = None) -> Metrics:
        """One training step; the metrics are on their way."""
        self.state, metrics = compiled_step(self.fixed, self.images if images is None else images, self.state)
        return metrics

    def compile(self, folder: Path) -> dict[str, float]:
        """Seconds to trace and to compile the step, with an empty cache of programs in `folder`, and with what it left
        there; then what the program reserves, in bytes per device."""
        fixed = self.fixed._asdict()
        root = fixed.pop("root")
        found: dict[str, float] = {}
        with kept_in(folder):
            for name in ("cold", "warm"):
                jax.clear_caches()
                start = time.perf_counter()
                lowered = step_program.lower(self.state, self.images, root, **fixed)
                traced = time.perf_counter()
                program = lowered.compile()
                found |= {f"trace_{name}_s": traced - start, f"compile_{name}_s": time.perf_counter() - traced}
            jax.block_until_ready(self.step())  # so that the step's own program comes from there, too
        memory = program.memory_analysis()
        taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return found | {"program_bytes": float(taken + memory.output_size_in_bytes - memory.alias_size_in_bytes)}

    def steps(self, rounds: int) -> dict[str, Any]:
        """Seconds of single steps, and images per second of steps that follow each other, as in training."""
        for _ in range(WARM):
            jax.block_until_ready(self.step())
        trim_heap()
        forget_peak()
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
        return found | {"peak_bytes": peak_bytes(), "programs": step_program._cache_size()}

    @staticmethod
    def followed(under_way: list[Metrics], metrics: Metrics) -> list[Metrics]:
        """The steps that are under way once the new one is: as in training, it waits for the one before it."""
        under_way = [*under_way, metrics][-AHEAD:]
        under_way[0]["loss"].block_until_ready()
        return under_way

    def with_input(self, rounds: int) -> dict[str, float]:
        """The same steps on batches as they are read, and the share of the time that the step waits for them."""
        config, mesh = self.config, self.plan.layout.mesh
        stream = read(config, self.plan.source, WARM + rounds, 0)
        waited, under_way = 0.0, []
        for number in range(WARM + rounds):
            if number == WARM:
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
        """Seconds of a step by part; they add up to the step's. See `jepax.bench.parts`."""
        from jepax.bench.parts import parts_of

        return parts_of(self, rounds)

    def utilisation(self, step_s: float, peak: float) -> dict[str, float]:
        """Arithmetic of the step's matrix products per second and device, over the peak."""
        flops = step_flops(self.plan) * self.config.train.batch_size / jax.device_count()
        return {
            "gflop_per_image": step_flops(self.plan) / 1e9,
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
