"""What `jepax bench` and `jepax bench-data` measure, and their tables."""

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jepax.bench import input_bench, report, torch_baseline
from jepax.bench.environment import describe_machine
from jepax.bench.peak import measure_peak_flops
from jepax.bench.step_bench import StepBenchmark
from jepax.io import config_yaml as configs
from jepax.training import dry_run
from jepax.training.config import Config, resolve_compute_dtype

GPU_MEMORY_VARIABLES = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
"""Names of JAX's for its share of a GPU's memory, of which one may be set."""


def run_bench(
    config: Config,
    repeats: int,
    say: Callable[[str], None] = print,
    *,
    json: Path | None = None,
    against_torch: bool = False,
) -> dict[str, Any]:
    """Measures a recipe's step here, prints one table, and writes and returns its numbers."""
    if against_torch and not GPU_MEMORY_VARIABLES & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.5"  # of a GPU's memory: PyTorch gets the rest
    found = measure_step(config, repeats, say)
    if against_torch:
        say("our step and PyTorch's in turn ...")
        found["peer"] = torch_baseline.compare_with_torch(config, repeats)
        found["machine"]["versions"]["torch"] = version("torch")
    return publish(found, report.table_rows(found), say, json)


def bench_data(
    config: Config, repeats: int, say: Callable[[str], None] = print, *, json: Path | None = None
) -> dict[str, Any]:
    """Measures how fast images are read here, prints one table, and writes and returns its numbers."""
    found = input_bench.measure_input(config, repeats, say)
    return publish(found, input_bench.table_rows(found), say, json)


def publish(
    found: dict[str, Any], lines: list[tuple[str, str]], say: Callable[[str], None], json: Path | None
) -> dict[str, Any]:
    """Prints the table and warnings, and writes and returns the numbers."""
    Console().print(report.format_table(found["what"], lines))
    for doubt in report.sanity_warnings(found):
        say(f"warning: {doubt}")
    if json is not None:
        report.write_report(json, found)
    return found


def measure_step(config: Config, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything but PyTorch."""
    compute, before = resolve_compute_dtype(config), describe_machine()
    say("the peak of a matrix product ...")
    peak = measure_peak_flops(compute)
    plan = dry_run.make_dry_setup(config, say)
    subject = StepBenchmark(plan)
    say("compiling the step, cold and warm ...")
    with tempfile.TemporaryDirectory() as folder:
        compiled = subject.compile(Path(folder))
    say("steps ...")
    steps = subject.steps(repeats)
    say("steps with their input, and by part ...")
    with_input, parts = subject.with_input(repeats), subject.parts(repeats)
    if jax.default_backend() == "cpu":  # which something else may have kept busy the first time
        peak = max(peak, measure_peak_flops(compute))
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "what": f"{config.recipe}, batch {config.train.batch_size}, {jnp.dtype(compute).name}, {where}",
        "machine": before,
        "config": configs.to_dict(config),
        "rounds": repeats,
        "compile": compiled,
        "steps": steps,
        "input": with_input,
        "parts": parts,
        "utilisation": subject.utilisation(steps["pipelined_step_s"], peak),
    }
