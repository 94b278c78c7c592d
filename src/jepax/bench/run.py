"""`jepax bench [data] RECIPE [--peer torch] [--json FILE] [--rounds N] [--field.path value ...]`"""

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
from jepax import dryrun, overrides
from jepax.bench import peer, reading, report
from jepax.bench.machine import machine
from jepax.bench.peak import matrix_peak
from jepax.bench.subject import Subject
from jepax.settings import Config, compute_dtype
from jepax.types import UserError

OURS = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
"""Names of JAX's for its share of a GPU's memory, of which one may be set."""
OWN = ("--peer", "--json", "--rounds")
ROUNDS = 20


def bench(arguments: list[str], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures a recipe's step here, prints one table, and writes and returns its numbers."""
    of_data = arguments[:1] == ["data"]
    config, given = resolve(arguments[1:] if of_data else arguments)
    if of_data and "--peer" in given:
        raise UserError("--peer is for steps: jepax bench RECIPE --peer torch")
    if "--peer" in given and not OURS & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.5"  # of a GPU's memory: the peer gets the rest
    rounds = int(given.get("--rounds", ROUNDS))
    found = (reading.measure if of_data else measure)(config, rounds, say)
    if "--peer" in given:
        say("our step and PyTorch's in turn ...")
        found["peer"] = peer.compare(config, rounds)
        found["machine"]["versions"]["torch"] = version("torch")
    Console().print(report.table(found["what"], (reading if of_data else report).lines(found)))
    for doubt in report.doubts(found):
        say(f"warning: {doubt}")
    if "--json" in given:
        report.write(Path(given["--json"]), found)
    return found


def resolve(arguments: list[str]) -> tuple[Config, dict[str, str]]:
    """The config, and what was given of `OWN`. Raises `UserError` naming what is not understood."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("give the recipe, or a config file, first: jepax bench RECIPE --field.path value ...")
    groups = overrides.grouped(arguments[1:])
    mine = [group for group in groups if group[0] in OWN]
    given = {group[0]: group[1] for group in mine if len(group) == 2}
    if len(given) < len(mine):
        raise UserError(f"each of {', '.join(OWN)} takes one value, once")
    if given.get("--peer", "torch") != "torch":
        raise UserError(f"--peer {given['--peer']} is not known; there is torch")
    if not given.get("--rounds", "1").isdecimal() or int(given.get("--rounds", "1")) < 1:
        raise UserError(f"--rounds {given['--rounds']} is no number of rounds; try {ROUNDS}")
    base = overrides.begin(arguments[0])
    return overrides.override(base, [group for group in groups if group not in mine]), given


def measure(config: Config, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything but the peer."""
    compute, before = compute_dtype(config), machine()
    say("the peak of a matrix product ...")
    peak = matrix_peak(compute)
    plan = dryrun.make_plan(config, say)
    subject = Subject(plan)
    say("compiling the step, cold and warm ...")
    with tempfile.TemporaryDirectory() as folder:
        compiled = subject.compile(Path(folder))
    say("steps ...")
    steps = subject.steps(rounds)
    say("steps with their input, and by part ...")
    with_input, parts = subject.with_input(rounds), subject.parts(rounds)
    if jax.default_backend() == "cpu":  # which something else may have kept busy the first time
        peak = max(peak, matrix_peak(compute))
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "what": f"{config.recipe}, batch {config.train.batch_size}, {jnp.dtype(compute).name}, {where}",
        "machine": before,
        "config": configs.to_dict(config),
        "rounds": rounds,
        "compile": compiled,
        "steps": steps,
        "input": with_input,
        "parts": parts,
        "utilisation": subject.utilisation(steps["pipelined_step_s"], peak),
    }
