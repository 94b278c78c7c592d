"""SIGReg, RDMReg and VISReg's shape term on chunks of directions against all directions at once: time and memory.

    python benchmarks/regularizers.py [--quick] [--json FILE]

Measured for value and gradient. The plain version is the same statistic on every direction in one array, which its
backward pass stores. Memory is what the compiler reserves beyond inputs and outputs. See README.md in this folder.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.random as jr
from jaxtyping import Array, Float

from jepax.bench.machine import describe_machine
from jepax.objectives.rdmreg import rdmreg, sample_target
from jepax.objectives.sigreg import sigreg
from jepax.objectives.slicing import random_unit_directions
from jepax.objectives.visreg import shape_term

Loss = Callable[..., Float[Array, ""]]
"""A function of embeddings, a target sample and directions."""
LOSSES: dict[str, dict[str, Loss]] = {
    "sigreg": {
        "ours": lambda z, target, directions: sigreg(z, directions),
        "plain": lambda z, target, directions: sigreg(z, directions, chunk=None),
    },
    "rdmreg": {"ours": rdmreg, "plain": partial(rdmreg, chunk=None)},
    "visreg's shape": {
        "ours": lambda z, target, directions: shape_term(z, directions),
        "plain": lambda z, target, directions: shape_term(z, directions, chunk=None),
    },
}
"""Each regularizer as it is, and plain: one chunk with every direction, nothing computed again."""


def compare(pair: dict[str, Loss], inputs: tuple[Array, Array, Array], rounds: int) -> dict[str, float]:
    """Time both in turn, after one warm-up each: milliseconds, and megabytes beyond inputs and outputs."""
    found, times = {}, {name: [] for name in pair}
    programs = {name: jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile() for name, loss in pair.items()}
    values = {name: float(program(*inputs)[0]) for name, program in programs.items()}
    if abs(values["ours"] / values["plain"] - 1) > 1e-4:
        raise SystemExit(f"the two do not agree: {values}")
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times[name].append(time.perf_counter() - start)
    for name, program in programs.items():
        found[f"{name}_ms"] = 1000 * statistics.median(times[name])
        found[f"{name}_mb"] = program.memory_analysis().temp_size_in_bytes / 1e6
    return found | {"ratio": found["ours_ms"] / found["plain_ms"]}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small batch, one round: only to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    args = parser.parse_args(words)
    batch, dim, count, rounds = (64, 32, 256, 1) if args.quick else (2048, 1024, 1024, 7)
    embeddings, target = jr.normal(jr.key(2), (batch, dim)), sample_target(jr.key(1), (batch, dim))
    inputs = embeddings, target, random_unit_directions(jr.key(0), dim, count)
    report = {"batch": batch, "dim": dim, "directions": count, "rounds": rounds, "machine": describe_machine()}
    for name, pair in LOSSES.items():
        report[name] = compare(pair, inputs, rounds)
        line = ", ".join(f"{key} {value:.4g}" for key, value in report[name].items())
        print(f"{name}, batch {batch}, width {dim}, {count} directions: {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
