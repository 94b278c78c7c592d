"""`jepax replay DUMP`: takes the step again that ended a run, and prints where it stops being finite."""

import math
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax import checkpoint, dump, sharding
from jepax import config as configs
from jepax.optim import Optimizer
from jepax.settings import Config, compute_dtype
from jepax.step import Fixed, TrainState, compiled_step, first_state, layout_of, loss_and_gradients
from jepax.types import Images, Metrics

MAX_SHOWN = 8
"""Names of arrays that are printed."""


def replay(folder: Path, print: Callable[[str], None] = print) -> Metrics:
    """Restores state, batch and config of the dump, takes the step again, and returns its metrics.

    Raises `UserError` where the folder has no dump, or a file of it is corrupt.
    """
    metadata, batch = dump.read_metadata(folder), dump.read_batch(folder)
    config = configs.load(Config, folder / dump.CONFIG)
    print(
        f"step {metadata.step} of {metadata.total_steps}, {len(batch.index)} examples,"
        f" positions {np.min(batch.index)} to {np.max(batch.index)}"
    )

    # The state before the step, on as many of these devices as divide the batch.
    optimizer = Optimizer(config.optim, metadata.total_steps, metadata.warmup_steps)
    mesh = sharding.make_mesh(math.gcd(len(batch.index), jax.device_count()))
    layout = layout_of(config.train.sharding, config.train.accumulate, config.method, optimizer, mesh)
    state = eqx.filter_eval_shape(first_state, config.method, optimizer, jr.key(config.seed))
    state = checkpoint.restore(folder / dump.STATE, metadata.step, layout.abstract(state))
    root, batch = sharding.replicate(jr.fold_in(jr.key(config.seed), 1), mesh), sharding.shard_batch(batch, mesh)
    print(f"state before it: {describe_non_finite(state)}")

    # Forward and backward alone: which terms and gradients are not finite?
    with layout.applied():
        terms, grads = _terms_and_grads(config, state, batch, root)
    print(f"terms and embeddings of the loss: {describe_non_finite(terms)}")
    print(f"gradients: {describe_non_finite(grads)}")

    # The step itself, as the run took it; it donates the state, so it comes last.
    fixed = Fixed(optimizer, root, compute_dtype(config), config.train.guard, layout, config.train.log_every)
    _, metrics = compiled_step(fixed, batch, state)
    for name in ("loss", "grad_norm"):
        print(f"{name}: {float(metrics[name])} now, {metadata.seen[name]} when the run took it")
    if is_bit_identical(metrics, metadata):
        print("bit-identical")
    elif metadata.where != (here := dump.device_and_versions(mesh.size)):
        print(f"the run had {metadata.where}; here is {here}")
    return metrics


def _terms_and_grads(config: Config, state: TrainState, batch: Images, root: jax.Array) -> tuple[Metrics, object]:
    compute = compute_dtype(config)

    @eqx.filter_jit
    def compute_them(state: TrainState, batch: Images, root: jax.Array) -> tuple[Metrics, object]:
        loss, metrics, grads = loss_and_gradients(state.method, batch, jr.fold_in(root, state.step), compute)
        return metrics | {"loss": loss}, grads

    return compute_them(state, batch, root)


def is_bit_identical(metrics: Metrics, metadata: dump.DumpMetadata) -> bool:
    """True if loss and gradient norm are what the run saw; NaN equals NaN."""
    names = ("loss", "grad_norm")
    now, seen = ([float(values[name]) for name in names] for values in (metrics, metadata.seen))
    return np.array_equal(now, seen, equal_nan=True)


def describe_non_finite(tree: object) -> str:
    """Names the arrays with values that are not finite, but for the guard's record of norms, which may have some."""
    arrays = {name: x for name, x in checkpoint.named_arrays(tree).items() if eqx.is_inexact_array(x)}
    bad = [name for name, x in arrays.items() if name != "guard.norms" and not bool(jnp.isfinite(x).all())]
    shown = ", ".join(bad[:MAX_SHOWN]) + (f" and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else "")
    return f"not finite in {shown}" if bad else "all finite"
