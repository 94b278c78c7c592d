"""Runs `jepax bench` and `jepax bench-data`: measures, prints one table, and writes the numbers as JSON."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jepax.bench import input_bench, report
from jepax.bench.environment import describe_machine
from jepax.bench.peak import measure_peak_flops
from jepax.bench.step_bench import StepBenchmark
from jepax.io import config_yaml
from jepax.training.config import Config, resolve_compute_dtype
from jepax.training.dry_run import make_dry_setup

LogFn = Callable[[str], None]


def run_bench(config: Config, repeats: int, print: LogFn = print, *, json: Path | None = None) -> dict[str, Any]:
    """Measure a recipe's step here, print one table, and write and return its numbers."""
    found = measure_step(config, repeats, print)
    return publish(found, report.table_rows(found), print, json)


def bench_data(config: Config, repeats: int, print: LogFn = print, *, json: Path | None = None) -> dict[str, Any]:
    """Measure how fast images are read here, print one table, and write and return its numbers."""
    found = input_bench.measure_input(config, repeats, print)
    return publish(found, input_bench.table_rows(found), print, json)


def publish(found: dict[str, Any], rows: list[tuple[str, str]], print: LogFn, json: Path | None) -> dict[str, Any]:
    """Print the table and warnings, and write and return the numbers."""
    Console().print(report.format_table(found["what"], rows))
    for warning in report.sanity_warnings(found):
        print(f"warning: {warning}")
    if json is not None:
        report.write_report(json, found)
    return found


def measure_step(config: Config, repeats: int, print: LogFn) -> dict[str, Any]:
    """Measure compilation, steps with and without their input, their parts, and utilization."""
    dtype, machine = resolve_compute_dtype(config), describe_machine()
    print("the peak of a matrix product ...")
    peak = measure_peak_flops(dtype)
    bench = StepBenchmark(make_dry_setup(config, print))

    print("compiling the step, cold and warm ...")
    with tempfile.TemporaryDirectory() as folder:
        compiled = bench.compile(Path(folder))

    print("steps ...")
    steps = bench.steps(repeats)
    print("steps with their input, and by part ...")
    with_input, parts = bench.with_input(repeats), bench.parts(repeats)

    # Another program may have used the CPU during the first measurement of the peak.
    if jax.default_backend() == "cpu":
        peak = max(peak, measure_peak_flops(dtype))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "what": f"{config.recipe}, batch {config.train.batch_size}, {jnp.dtype(dtype).name}, {devices}",
        "machine": machine,
        "config": config_yaml.to_dict(config),
        "rounds": repeats,
        "compile": compiled,
        "steps": steps,
        "input": with_input,
        "parts": parts,
        "utilization": bench.utilization(steps["step_s_pipelined"], peak),
    }
