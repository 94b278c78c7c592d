"""`jepax bench`: measures a recipe's step, prints one table, and writes the numbers as JSON."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jepax.bench.machine import describe_machine, peak_flops
from jepax.bench.step_bench import StepBenchmark
from jepax.io import atomic, config_yaml
from jepax.training.config import Config, resolve_compute_dtype
from jepax.training.dry_run import LogFn, make_dry_setup
from jepax.training.speed import save_peak

MAX_IDLE_LOAD = 0.5
"""Largest load average per core of an idle machine."""
MAX_NEGATIVE_FRACTION = 0.05
"""Fraction of a step by which a part may be below zero without a warning."""


def publish(found: dict[str, Any], rows: list[tuple[str, str]], file: Path | None) -> None:
    """Print the table, whose rows have a name and a value, and warnings; write all numbers."""
    table = Table(title=found["what"], show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for warning in sanity_warnings(found):
        print(f"warning: {warning}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write(file, json.dumps(found, indent=1) + "\n")


def measure_step(config: Config, repeats: int, print: LogFn = print) -> dict[str, Any]:
    """Measure compilation, steps with and without their input, their parts, and utilization."""
    dtype, machine = resolve_compute_dtype(config), describe_machine()
    print("the peak of a matrix product ...")
    peak = peak_flops(dtype)
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
        peak = max(peak, peak_flops(dtype))
    else:  # for `perf/mfu_measured` of runs on such a device
        save_peak(jax.devices()[0].device_kind, jnp.dtype(dtype).name, peak / 1e12)
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


def step_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each row of the table."""
    steps, compiled, use, parts = found["steps"], found["compile"], found["utilization"], found["parts"]
    median, low, high = (format_ms(steps["step_s"][name]) for name in ("p50", "p10", "p90"))
    peak, total = steps["peak_bytes"], sum(parts.values())
    return [
        ("images per second", f"{steps['images_per_s']:,.1f}"),
        ("step, median (10% to 90%)", f"{median} ({low} to {high})"),
        ("step, one after the other", format_ms(steps["step_s_pipelined"])),
        ("with its input: images per second", f"{found['input']['images_per_s']:,.1f}"),
        ("with its input: waits for it", f"{100 * found['input']['input_wait_fraction']:.1f}%"),
        ("arithmetic", f"{use['gflop_per_image']:.4g} GFLOP per image"),
        ("done", f"{use['tflop_per_s']:.4g} TFLOP/s per device"),
        ("measured peak of a matrix product", f"{use['peak_tflop_per_s']:.4g} TFLOP/s"),
        ("utilization", f"{100 * use['utilization']:.1f}%"),
        ("compilation, cold", f"{compiled['trace_cold_s']:.1f} + {compiled['compile_cold_s']:.1f} s"),
        ("compilation, warm", f"{compiled['trace_warm_s']:.1f} + {compiled['compile_warm_s']:.1f} s"),
        ("training programs", str(steps["programs"])),
        ("memory of the program", f"{compiled['program_bytes'] / 1e9:.2f} GB"),
        ("peak memory", "-" if peak is None else f"{peak / 1e9:.2f} GB"),
        *((f"  {name}", f"{format_ms(value)} {100 * value / total:5.1f}%") for name, value in parts.items()),
    ]


def format_ms(seconds: float) -> str:
    """Format as milliseconds with three significant digits, without decimals from 100 ms on."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def sanity_warnings(found: dict[str, Any]) -> list[str]:
    """Warnings that another program probably used the machine and distorted the numbers."""
    (load, *_), cores = found["machine"]["load_average"], found["machine"]["cores"]
    warnings = []
    if load > MAX_IDLE_LOAD * cores:
        warnings.append(f"the load average was {load:.1f} on {cores} cores at the start: times may be too long")
    if found.get("utilization", {}).get("utilization", 0) > 1:
        warnings.append("utilization above 100%: another program slowed the measurement of the machine's peak")
    parts = found.get("parts", {})
    least = min(parts, key=parts.__getitem__, default=None)
    if least is not None and parts[least] < -MAX_NEGATIVE_FRACTION * sum(parts.values()):
        warnings.append(f"{least} below zero: parts are differences of times, which another program disturbed")
    return warnings
