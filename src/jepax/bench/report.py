"""A benchmark's numbers as a table, and as JSON."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from jepax.io import atomic

MAX_IDLE_LOAD = 0.5
"""Load average per core above which a machine is not idle."""
MAX_NEGATIVE_FRACTION = 0.05
"""Share of a step that a part may be below zero without a word."""


def write_report(path: Path, found: dict[str, Any]) -> None:
    """The file with these numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.atomic_write(path, json.dumps(found, indent=1) + "\n")


def format_table(what: str, lines: list[tuple[str, str]]) -> Table:
    """One table of everything that was measured."""
    rows = Table(title=what, show_header=False)
    rows.add_column()
    rows.add_column(justify="right")
    for name, value in lines:
        rows.add_row(name, value)
    return rows


def table_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each row."""
    steps, compiled, use = found["steps"], found["compile"], found["utilisation"]
    each = steps["step_s"]
    rows = [
        ("images per second", f"{steps['images_per_s']:,.1f}"),
        (
            "step, median (10% to 90%)",
            f"{format_ms(each['p50'])} ({format_ms(each['p10'])} to {format_ms(each['p90'])})",
        ),
        ("step, one after the other", format_ms(steps["pipelined_step_s"])),
        ("with its input: images per second", f"{found['input']['images_per_s']:,.1f}"),
        ("with its input: waits for it", f"{100 * found['input']['waited_share']:.1f}%"),
        ("arithmetic", f"{use['gflop_per_image']:.4g} GFLOP per image"),
        ("done", f"{use['tflop_per_s']:.4g} TFLOP/s per device"),
        ("measured peak of a matrix product", f"{use['peak_tflop_per_s']:.4g} TFLOP/s"),
        ("utilisation", f"{100 * use['utilisation']:.1f}%"),
        ("compilation, cold", f"{compiled['trace_cold_s']:.1f} + {compiled['compile_cold_s']:.1f} s"),
        ("compilation, warm", f"{compiled['trace_warm_s']:.1f} + {compiled['compile_warm_s']:.1f} s"),
        ("training programs", str(steps["programs"])),
        ("memory of the program", format_gigabytes(compiled["program_bytes"])),
        ("peak memory", format_gigabytes(steps["peak_bytes"])),
    ]
    whole = sum(found["parts"].values())
    rows += [(f"  {name}", f"{format_ms(value)} {100 * value / whole:5.1f}%") for name, value in found["parts"].items()]
    for name, peer in found.get("peer", {}).get("against", {}).items():
        spread = f"({peer['low']:.2f} to {peer['high']:.2f})"
        rows.append((f"time over {name}'s", f"{peer['ratio']:.2f} {spread}, {format_ms(peer['theirs_s'])}"))
    return rows


def sanity_warnings(found: dict[str, Any]) -> list[str]:
    """What says that something else used the machine, so that its numbers are not those of the step."""
    (load, *_), cores = found["machine"]["load_average"], found["machine"]["cores"]
    said = []
    if load > MAX_IDLE_LOAD * cores:
        said.append(f"the load average was {load:.1f} on {cores} cores as this began: times may be too long")
    if found.get("utilisation", {}).get("utilisation", 0) > 1:
        said.append("utilisation above 100%: something else slowed the product that was to show the machine's peak")
    parts = found.get("parts", {})
    if (least := min(parts, key=parts.__getitem__, default=None)) and parts[least] < -MAX_NEGATIVE_FRACTION * sum(
        parts.values()
    ):
        said.append(f"{least} below zero: parts are differences of times, which something else disturbed")
    return said


def format_ms(seconds: float) -> str:
    """Milliseconds with three digits, or as many as are whole."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def format_gigabytes(count: float | int | None) -> str:
    """Or a dash."""
    return "-" if count is None else f"{count / 1e9:.2f} GB"
