"""Kernels against their plain forms: time of value and gradient, and a step's temporary memory without each of them.

    python benchmarks/kernels.py [--rounds 20]

Each pair is timed interleaved, float32 on a CPU and bfloat16 on a GPU; a time is the fastest of the rounds.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr

from jepax.bench.timing import interleave
from jepax.nn import transformer
from jepax.nn.transformer import FAST, PLAIN
from jepax.optim import OptimConfig, Optimizer
from jepax.recipes import RECIPES
from jepax.training.step import TrainContext, loss_and_grads
from jepax.types import ImageBatch

DTYPE = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
SHAPES = {"demo": (128, 16, 192, 3), "demo, predictor": (256, 12, 96, 3), "ViT-B/16": (8, 196, 768, 12)}
"""Batch, tokens, width and heads."""
STEPS = {"ijepa_fashion_mnist": (128, {}), "ijepa_vitb16_in1k": (8, {"depth": 3, "scan": False, "remat": "none"})}
"""Batch of the steps that are compiled, and how their networks differ from the recipe's."""


def cases(batch: int, tokens: int, dim: int, heads: int) -> dict[str, tuple[Callable, Callable, list[jax.Array]]]:
    """Make the plain and the fast form of each function, and its arguments."""
    x, hidden = (jr.normal(jr.key(0), (batch, tokens, width), DTYPE) for width in (dim, 4 * dim))
    wide, qkv = (jr.normal(jr.key(1), (dim, n * dim), DTYPE) / dim**0.5 for n in (4, 3))
    one, four, three = (jnp.ones(n * dim, DTYPE) for n in (1, 4, 3))
    given = {"linear, fc1": [x, wide, four], "linear, fc2": [hidden, wide.T, one], "layer_norm": [x, one, one]}
    given |= {"gelu": [hidden], "self_attention": [x, qkv, three], "self_attention, half the queries": [x, qkv, three]}
    found = {}
    for name, arguments in given.items():
        options = {"num_heads": heads, "num_queries": tokens // (1 + ("half" in name))} if "attention" in name else {}
        found[name] = *(partial(getattr(ops, name.split(",")[0]), **options) for ops in (PLAIN, FAST)), arguments
    return found


def times_of(plain: Callable, fast: Callable, arguments: list[jax.Array], rounds: int) -> list[float]:
    """Time value and gradient of both forms, in milliseconds."""
    forms = {"a": plain, "b": fast}
    programs = {k: jax.jit(lambda *a, f=f: (lambda y, back: back(y))(*jax.vjp(f, *a))) for k, f in forms.items()}
    times = interleave({name: partial(program, *arguments) for name, program in programs.items()}, rounds)
    return [1e3 * min(times[name]) for name in forms]


def step_memory(recipe: str, batch: int, changes: dict) -> int:
    """Compile a step's loss and gradients as one program, and return its temporary bytes; nothing is computed."""
    config = RECIPES[recipe]().method
    build = replace(config, **{n: replace(getattr(config, n), **changes) for n in ("encoder", "predictor")}).build
    canvas, integers = (batch, *config.crop.size, config.encoder.in_channels), partial(jnp.zeros, dtype=jnp.int32)
    images = ImageBatch(jnp.zeros(canvas, jnp.uint8), integers((batch, 2)), integers(batch))
    given = jax.eval_shape(lambda: (build(total_steps=1, key=jr.key(0)), images))
    context = TrainContext(Optimizer(OptimConfig(), total_steps=1, warmup_steps=0), DTYPE)
    program = jax.jit(lambda method, images: loss_and_grads(method, images, jr.key(0), context))
    return program.lower(*given).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    for shape, sizes in SHAPES.items():
        for name, case in cases(*sizes).items():
            plain, fast = times_of(*case, args.rounds)
            print(f"| {shape} | {name} | {plain:.2f} | {fast:.2f} | {plain / fast:.2f} |", flush=True)
    for recipe, (batch, changes) in STEPS.items():
        for name in ("nothing", *FAST._fields, "everything"):
            without = [field for field in FAST._fields if name in (field, "everything")]
            transformer.FAST = FAST._replace(**{field: getattr(PLAIN, field) for field in without})
            print(f"| {recipe} | plain {name} | {step_memory(recipe, batch, changes) / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
