"""`jepax replay DUMP`: takes the step again that ended a run, and prints where it stops being finite."""

import math
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.data import Source, batches
from jepax.distributed import sharding
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.optim import Optimizer
from jepax.training import nan_dump
from jepax.training.config import Config
from jepax.training.setup import Setup, make_plan
from jepax.training.step import loss_and_grads, run_train_step
from jepax.types import Metrics

MAX_SHOWN = 8
"""Names of arrays that are printed."""


def replay(folder: Path, print: Callable[[str], None] = print, *, source: Source | None = None) -> Metrics:
    """Restores state, batch and config of the dump, runs the step again, and returns its metrics.

    `source`: the data of a run that `train` got as its `source`. Raises `UserError` if the folder has no dump, or a
    file of it is corrupt.
    """
    like = next(batches(source, batch_size=1, steps=1, seed=0, num_threads=0)) if source is not None else None
    metadata, batch = nan_dump.read_metadata(folder), nan_dump.read_batch(folder, like)
    config = configs.load(Config, folder / nan_dump.CONFIG_FILE)
    print(
        f"step {metadata.step} of {metadata.total_steps}, {len(batch.index)} examples,"
        f" positions {np.min(batch.index)} to {np.max(batch.index)}"
    )

    # The state before the step, on as many of these devices as divide the batch.
    optimizer = Optimizer(config.optim, metadata.total_steps, metadata.warmup_steps)
    plan = make_plan(config, optimizer, devices=math.gcd(len(batch.index), jax.device_count()))
    setup = Setup(config, None, optimizer, plan)
    state = checkpoint.restore(folder / nan_dump.STATE_DIR, metadata.step, plan.abstract(setup.abstract_state()))
    batch, base_key = sharding.shard_batch(batch, plan.mesh), setup.base_key
    print(f"state before it: {describe_non_finite(state)}")

    # Forward and backward alone: which terms and gradients are not finite?
    key = jr.fold_in(base_key, state.step)
    loss, terms, grads = eqx.filter_jit(loss_and_grads)(state.method, batch, key, setup.context)
    print(f"terms and embeddings of the loss: {describe_non_finite(terms | {'train/loss': loss})}")
    print(f"gradients: {describe_non_finite(grads)}")

    # The step itself, as the run took it; it donates the state, so it comes last.
    _, metrics = run_train_step(state, batch, base_key, setup.context)
    for name in ("train/loss", "optim/grad_norm"):
        print(f"{name}: {float(metrics[name])} now, {metadata.seen[name]} when the run took it")
    if is_bit_identical(metrics, metadata):
        print("bit-identical")
    elif metadata.where != (here := nan_dump.device_and_versions(plan.mesh.size)):
        print(f"the run had {metadata.where}; here is {here}")
    return metrics


def is_bit_identical(metrics: Metrics, metadata: nan_dump.DumpMetadata) -> bool:
    """True if loss and gradient norm are what the run saw; NaN equals NaN."""
    names = ("train/loss", "optim/grad_norm")
    now, seen = ([float(values[name]) for name in names] for values in (metrics, metadata.seen))
    return np.array_equal(now, seen, equal_nan=True)


def describe_non_finite(tree: object) -> str:
    """Names the arrays with values that are not finite, but for the guard's record of norms, which may have some."""
    arrays = {name: x for name, x in checkpoint.named_arrays(tree).items() if eqx.is_inexact_array(x)}
    bad = [name for name, x in arrays.items() if name != "guard.norms" and not bool(jnp.isfinite(x).all())]
    shown = ", ".join(bad[:MAX_SHOWN]) + (f" and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else "")
    return f"not finite in {shown}" if bad else "all finite"
