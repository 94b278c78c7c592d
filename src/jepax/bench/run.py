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

from jepax import config as configs
from jepax import dryrun
from jepax.bench import peer, reading, report
from jepax.bench.machine import machine
from jepax.bench.peak import matrix_peak
from jepax.bench.subject import Subject
from jepax.settings import Config, compute_dtype

OURS = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
"""Names of JAX's for its share of a GPU's memory, of which one may be set."""


def bench(
    config: Config,
    repeats: int,
    say: Callable[[str], None] = print,
    *,
    json: Path | None = None,
    against_torch: bool = False,
) -> dict[str, Any]:
    """Measures a recipe's step here, prints one table, and writes and returns its numbers."""
    if against_torch and not OURS & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.5"  # of a GPU's memory: PyTorch gets the rest
    found = measure(config, repeats, say)
    if against_torch:
        say("our step and PyTorch's in turn ...")
        found["peer"] = peer.compare(config, repeats)
        found["machine"]["versions"]["torch"] = version("torch")
    return publish(found, report.lines(found), say, json)


def bench_data(
    config: Config, repeats: int, say: Callable[[str], None] = print, *, json: Path | None = None
) -> dict[str, Any]:
    """Measures how fast images are read here, prints one table, and writes and returns its numbers."""
    found = reading.measure(config, repeats, say)
    return publish(found, reading.lines(found), say, json)


def publish(
    found: dict[str, Any], lines: list[tuple[str, str]], say: Callable[[str], None], json: Path | None
) -> dict[str, Any]:
    """Prints the table and warnings, and writes and returns the numbers."""
    Console().print(report.table(found["what"], lines))
    for doubt in report.doubts(found):
        say(f"warning: {doubt}")
    if json is not None:
        report.write(json, found)
    return found


def measure(config: Config, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything but PyTorch."""
    compute, before = compute_dtype(config), machine()
    say("the peak of a matrix product ...")
    peak = matrix_peak(compute)
    plan = dryrun.make_plan(config, say)
    subject = Subject(plan)
    say("compiling the step, cold and warm ...")
    with tempfile.TemporaryDirectory() as folder:
        compiled = subject.compile(Path(folder))
    say("steps ...")
    steps = subject.steps(repeats)
    say("steps with their input, and by part ...")
    with_input, parts = subject.with_input(repeats), subject.parts(repeats)
    if jax.default_backend() == "cpu":  # which something else may have kept busy the first time
        peak = max(peak, matrix_peak(compute))
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
