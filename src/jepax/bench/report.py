"""Formats a benchmark's numbers as a table, writes them as JSON, and warns of those that cannot be right."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from jepax.io import atomic

MAX_IDLE_LOAD = 0.5
"""Largest load average per core of an idle machine."""
MAX_NEGATIVE_FRACTION = 0.05
"""Fraction of a step by which a part may be below zero without a warning."""


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write the numbers as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.atomic_write(path, json.dumps(found, indent=1) + "\n")


def format_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Make one table of all rows."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def table_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each row."""
    steps, compiled, use, parts = found["steps"], found["compile"], found["utilization"], found["parts"]
    median, low, high = (format_ms(steps["step_s"][name]) for name in ("p50", "p10", "p90"))
    total = sum(parts.values())
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
        ("memory of the program", format_gigabytes(compiled["program_bytes"])),
        ("peak memory", format_gigabytes(steps["peak_bytes"])),
        *((f"  {name}", f"{format_ms(value)} {100 * value / total:5.1f}%") for name, value in parts.items()),
    ]


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


def format_ms(seconds: float) -> str:
    """Format as milliseconds with three significant digits, without decimals from 100 ms on."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def format_gigabytes(count: float | int | None) -> str:
    """Format as gigabytes; None as a dash."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"
