"""Attention of I-JEPA's ViT-B/16 step on a GPU: the Pallas kernel, split in several ways, against cuDNN's.

    python benchmarks/attention_kernels.py [--seconds 55] [--quick] [--json FILE]
    python benchmarks/attention_kernels.py --step [--best FILE] [--rounds 8] [--batch 128] [--json FILE]

Shapes are those of the recipe at batch 128. A program computes `LAYERS` layers on different arrays, as a step does.
Every way must agree with cuDNN to `MAX_ERROR`; one that fails is reported, and the others go on. `--step` times the
recipe's whole training step with either kernel, in turn, in one process.
"""

import argparse
import json
import math
import time
from ast import literal_eval
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.bench.timing import interleave
from jepax.masking import MultiBlockConfig, block_sizes
from jepax.nn import kernels
from jepax.nn.kernels import cudnn_attention
from pallas_attention import BEST, Tiles, pallas_attention

LAYERS, CALLS, ROUNDS = 6, 4, 7
"""Layers of a program, and programs that run one after the other in each of the rounds."""
MAX_ERROR = 0.02
"""Norm of the difference to cuDNN's result over its norm; rounding to bfloat16 is 0.3 to 1%."""
MAX_TOKENS = 128
"""Longest sequences that the whole step gives to the Pallas kernel: at 196 it gains nothing."""
GRID, CONTEXT, BATCH, HEADS = (14, 14), 50, 128, 12
TARGET = int(block_sizes(GRID, *((c := MultiBlockConfig()).target_scale, c.target_aspect_ratio), 1)[0].prod(1).max())
SHAPES = {
    "predictor": (4 * BATCH, CONTEXT + TARGET, CONTEXT + TARGET, 32, True),
    "teacher": (BATCH, 196, 196, 64, False),
    "context": (BATCH, CONTEXT, CONTEXT, 64, False),
    "predictor's last": (4 * BATCH, TARGET, CONTEXT + TARGET, 32, True),
}
"""Sequences, queries, tokens, channels, and if there are lengths. The teacher has no gradient."""
FORWARDS = {
    "predictor": [Tiles(64, 128, 4), Tiles(128, 128, 8), Tiles(64, 32, 4), Tiles(128, 32, 8), Tiles(64, 64, 4)],
    "teacher": [Tiles(64, 256, 4), Tiles(128, 256, 8), Tiles(64, 64, 4), Tiles(128, 64, 8), Tiles(128, 32, 8)],
    "context": [Tiles(64, 64, 4), Tiles(64, 64, 8), Tiles(64, 64, 2), Tiles(32, 64, 2)],
}
BACKWARDS = {
    "predictor": [Tiles(64, 128, 4), Tiles(128, 128, 8), Tiles(64, 128, 8), Tiles(64, 64, 4), Tiles(64, 64, 8)],
    "context": [Tiles(64, 64, 4), Tiles(64, 64, 8), Tiles(64, 64, 2)],
}
FORWARDS["predictor's last"] = BACKWARDS["predictor's last"] = [Tiles(64, 128, 4), Tiles(64, 128, 8), Tiles(64, 64, 4)]


def make_inputs(shape: tuple[int, int, int, int, bool], quick: bool) -> list[tuple[jax.Array, ...]]:
    """Queries, keys, values, the result's gradient and lengths of each layer."""
    sequences, queries, tokens, channels, masked = shape
    sequences, heads, dtype = (2, 1, jnp.float32) if quick else (sequences, HEADS, jnp.bfloat16)

    def layer(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jr.split(key, 5)
        counts = (queries, tokens, tokens, queries)
        arrays = [jr.normal(k, (sequences, n, heads, channels), dtype) for k, n in zip(keys[:4], counts, strict=True)]
        arrays[3] = arrays[3].reshape(sequences, queries, -1)
        return *arrays, (jr.randint(keys[4], (sequences,), tokens - 10, tokens + 1) if masked else None)

    return jax.jit(lambda key: [layer(k) for k in jr.split(key, 1 if quick else LAYERS)])(jr.key(0))


def make_program(attention: Callable[..., jax.Array], gradient: bool) -> Callable[..., Any]:
    """Attention in every layer, or attention and its gradient."""

    def layer(q: jax.Array, k: jax.Array, v: jax.Array, given: jax.Array, lengths: jax.Array | None) -> Any:
        if not gradient:
            return attention(q, k, v, lengths)
        value, back = jax.vjp(lambda *x: attention(*x, lengths), q, k, v)
        return value, *back(given)

    return jax.jit(lambda layers: [layer(*each) for each in layers])


def ways_of(name: str, quick: bool) -> dict[str, tuple[Callable[..., jax.Array], bool]]:
    """Every way to compute this shape, by a name that sorts: cuDNN first, then ours."""
    cudnn = partial(cudnn_attention, implementation="xla") if quick else cudnn_attention
    found = {"forward, cudnn": (cudnn, False), "forward, default": (pallas_attention, False)}
    for tiles in FORWARDS[name][: 1 if quick else None]:
        found[f"forward, {tuple(tiles)}"] = partial(pallas_attention, forward=tiles), False
    if name not in BACKWARDS:
        return found
    found |= {"both, cudnn": (cudnn, True), "both, default": (pallas_attention, True)}
    for tiles in BACKWARDS[name][: 1 if quick else None]:
        found[f"both, {tuple(tiles)}"] = partial(pallas_attention, backward=tiles), True
    return found


@jax.jit
def error_to(expected: Any, got: Any) -> jax.Array:
    """Greatest relative error, in norm, of any array."""
    pairs = zip(*map(jax.tree.leaves, (expected, got)), strict=True)
    wide = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]
    return jnp.max(jnp.array([jnp.linalg.norm(x - y) / jnp.linalg.norm(x) for x, y in wide]))


def measure_shape(name: str, pool: ThreadPoolExecutor, quick: bool, end: float) -> dict[str, Any]:
    """Milliseconds of one layer in each way, or why there are none."""
    layers = make_inputs(SHAPES[name], quick)
    compiling: dict[str, Future] = {}
    for way, (attention, gradient) in ways_of(name, quick).items():
        compiling[way] = pool.submit(lambda f=attention, g=gradient: make_program(f, g).lower(layers).compile())
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for way, future in compiling.items():
        try:
            program = future.result(timeout=max(end - time.monotonic(), 0.1))
            first = program(layers)[0]
            error = float(error_to(expected.setdefault(way.split(",")[0], first), first))
            if not error < MAX_ERROR:
                raise ArithmeticError(f"differs from cuDNN by {error:.3f}")
            found[way] = {"error": error}
            calls[way] = lambda f=program: [f(layers) for _ in range(CALLS)][-1]
        except Exception as problem:  # reported; the others go on
            found[way] = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
    for way, times in interleave(calls, 2 if quick else ROUNDS).items():
        found[way]["ms"] = 1e3 * float(np.median(times)) / CALLS / len(layers)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """Print one shape's table."""
    print(f"\n{name}: sequences, queries, tokens, channels, masked = {SHAPES[name]}", flush=True)
    for way, each in found.items():
        against = found.get(f"{way.split(',')[0]}, cudnn", {}).get("ms")
        if "ms" in each and against:
            print(
                f"| {way} | {each['ms']:.4f} ms | {against / each['ms']:.2f} | error {each['error']:.4f} |", flush=True
            )
        else:
            print(f"| {way} | {each.get('failed', each)} |", flush=True)


def measure_kernels(shapes: list[str], seconds: float, quick: bool, write: Callable[[Any], None]) -> dict[str, Any]:
    """These shapes, as long as there is time; writes the results after each."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for name in shapes:
            if time.monotonic() > end:
                found[name] = {"all": {"failed": "no time left"}}
                continue
            found[name] = measure_shape(name, pool, quick, end)
            write(found)
            show(name, found[name])
            print(f"  {end - time.monotonic():.0f} s left", flush=True)
    return found


def read_best(path: Path) -> None:
    """Let the step use the fastest tiles that an earlier call wrote to this file."""
    results = json.loads(path.read_text())
    for name in SHAPES.keys() & results.keys():
        fastest: dict[str, tuple[float, Tiles]] = {}
        for way, each in results[name].items():
            kind, _, split = way.partition(", ")
            if "ms" in each and split.startswith("("):
                fastest[kind] = min(fastest.get(kind, (math.inf,)), (each["ms"], Tiles(*literal_eval(split))))
        if "forward" in fastest:
            forward = fastest["forward"][1]
            BEST[SHAPES[name][1:4]] = forward, fastest["both"][1] if "both" in fastest else forward
            print(f"{name}: forward and backward by {BEST[SHAPES[name][1:4]]}", flush=True)


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """The Pallas kernel for at most `MAX_TOKENS` tokens and channels that it takes, else cuDNN's."""
    fits = k.shape[1] <= MAX_TOKENS and k.shape[3] in (16, 32, 64, 128)
    return (pallas_attention if fits else cudnn_attention)(q, k, v, lengths)


def measure_step(rounds: int, batch: int, quick: bool) -> dict[str, Any]:
    """Time the recipe's step, in seconds, with cuDNN's and with the Pallas kernel in turn, each from its own state."""
    from gpu import Case
    from jepax.bench.timing import median_ratio
    from jepax.distributed import sharding
    from jepax.training.setup import make_setup
    from jepax.training.step import jit_train_step

    setup = make_setup(Case("ijepa_vitb16_in1k", quick).config(8 if quick else batch))
    given = sharding.shard_batch(next(setup.batches(steps=1)), setup.plan.mesh)
    runs, losses = {}, {}
    for kernel in ("cudnn", "pallas"):
        kernels.cudnn_attention = cudnn_attention if kernel == "cudnn" else fused_attention
        jax.clear_caches()  # the kernel is looked up while the step is traced
        started, state = time.monotonic(), setup.init_state()
        program = jit_train_step.lower(state, given, setup.base_key, setup.context).compile()
        runs[kernel] = partial(run_steps, program, [state], given, setup.base_key)
        losses[kernel] = [runs[kernel](1) for _ in range(3)]
        print(f"{kernel}: compiled in {time.monotonic() - started:.1f} s, losses {losses[kernel]}", flush=True)
    kernels.cudnn_attention = cudnn_attention
    count = 2 if quick else 20
    times = interleave({kernel: partial(run, count) for kernel, run in runs.items()}, rounds)
    seconds = {kernel: [taken / count for taken in each] for kernel, each in times.items()}
    ratio = median_ratio(seconds["pallas"], seconds["cudnn"])
    for kernel, each in seconds.items():
        print(f"{kernel}: {1e3 * np.median(each):.2f} ms, {batch / np.median(each):.0f} images/s", flush=True)
    print(f"pallas / cudnn: {ratio}", flush=True)
    return {"batch": batch, "losses": losses, "seconds": seconds, "ratio": ratio}


def run_steps(program: Callable[..., Any], state: list[Any], batch: Any, key: jax.Array, count: int) -> float:
    """Run so many steps one after the other; return the last one's loss."""
    for _ in range(count):
        state[0], metrics = program(state[0], batch, key)
    return float(metrics["train/loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=55.0, help="when to stop timing kernels (55)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--step", action="store_true", help="time the whole step instead")
    parser.add_argument("--best", type=Path, metavar="FILE", help="results whose fastest tiles the step uses")
    parser.add_argument("--rounds", type=int, default=8, help="of the whole step (8)")
    parser.add_argument("--batch", type=int, default=128, help="of the whole step (128)")
    parser.add_argument("--quick", action="store_true", help="tiny: only to see that it runs, also on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    def write(found: dict[str, Any]) -> None:
        found |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    if args.best and args.best.exists():
        read_best(args.best)
    if args.step:
        write(measure_step(2 if args.quick else args.rounds, args.batch, args.quick))
    else:
        write(measure_kernels(args.shapes, args.seconds, args.quick, write))


if __name__ == "__main__":
    main()
