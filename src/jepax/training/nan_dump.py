"""Dump of the step that ended a run (the state before it, its batch, the config), and `jepax replay`, which repeats it.

write_dump: the run stops -> RUN/dumps/step_N
replay:     dump -> the same step again -> where it stops being finite
"""

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxlib
import numpy as np

from jepax.data import Source, batches
from jepax.data.sources import Batch
from jepax.distributed import multihost, sharding
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.optim import Optimizer
from jepax.training.config import CONFIG_FILE, Config, resolve_compute_dtype
from jepax.training.monitor import NonFiniteError
from jepax.training.setup import Setup, make_plan
from jepax.training.step import TrainState, loss_and_grads, run_train_step
from jepax.types import AnyArray, ImageBatch, Metrics, UserError

METADATA_FILE, STATE_DIR = "dump.json", "state"
MAX_SHOWN = 8
"""Names of arrays that are printed."""


@dataclass(frozen=True)
class DumpMetadata:
    """The inputs of a step other than state, batch and config, and its results."""

    step: int
    total_steps: int
    warmup_steps: int
    where: str
    """Devices and versions of the run."""
    seen: dict[str, float | str]
    """Loss and gradient norm; text where they are not finite."""


def write_dump(run: Path, state: TrainState, end: NonFiniteError, config: Config, optimizer: Optimizer) -> Path:
    """Write `run`/dumps/step_N. `state` may be later than that step, if no step from there on changed it."""
    step, folder = end.step, run / "dumps" / f"step_{end.step:08d}"
    if multihost.is_main_process():  # removed first: a batch's part of a run on more processes would count
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    # The state before the step: its number, and a guard that the step itself has not used up yet.
    consecutive = jnp.minimum(state.guard.consecutive_nonfinite, config.train.grad_guard.max_consecutive_nonfinite - 1)
    before = eqx.tree_at(
        lambda s: (s.step, s.guard.consecutive_nonfinite), state, (jnp.full_like(state.step, step), consecutive)
    )
    checkpoint.save(folder / STATE_DIR, step, before)

    # Each process writes its part of the batch; the main one writes the rest.
    np.savez(folder / batch_filename(jax.process_index()), **batch_arrays(end.batch))
    if multihost.is_main_process():
        where = device_and_versions(jax.device_count())
        metadata = DumpMetadata(step, optimizer.total_steps, optimizer.warmup_steps, where, end.numbers)
        (folder / METADATA_FILE).write_text(json.dumps(asdict(metadata), indent=1) + "\n")
        train = replace(config.train, compute_dtype=jnp.dtype(resolve_compute_dtype(config)).name)
        configs.save(replace(config, train=train), folder / CONFIG_FILE)
    return folder


def replay(folder: Path, print: Callable[[str], None] = print, *, source: Source | None = None) -> Metrics:
    """Repeat the step of a dump, print where it stops being finite, and return its metrics.

    `source`: the data of a run that `train` got as its `source`. Raises `UserError` if the folder has no dump, or a
    file of it is corrupt.
    """
    like = next(batches(source, batch_size=1, steps=1, seed=0, num_threads=0)) if source is not None else None
    metadata, batch = read_metadata(folder), read_batch(folder, like)
    config = configs.load(Config, folder / CONFIG_FILE)
    print(
        f"step {metadata.step} of {metadata.total_steps}, {len(batch.index)} examples,"
        f" positions {np.min(batch.index)} to {np.max(batch.index)}"
    )

    # The state before the step, on as many of these devices as divide the batch.
    optimizer = Optimizer(config.optim, metadata.total_steps, metadata.warmup_steps)
    plan = make_plan(config, optimizer, devices=math.gcd(len(batch.index), jax.device_count()))
    setup = Setup(config, None, optimizer, plan)
    state = checkpoint.restore(folder / STATE_DIR, metadata.step, plan.abstract(setup.abstract_state()))
    batch, base_key = sharding.shard_batch(batch, plan.mesh), setup.base_key
    print(f"state before it: {describe_non_finite(state)}")

    # Forward and backward alone: which terms and gradients are not finite?
    key = jr.fold_in(base_key, state.step)
    loss, terms, grads = eqx.filter_jit(loss_and_grads)(state.method, batch, key, setup.context)
    print(f"terms and embeddings of the loss: {describe_non_finite(terms | {'train/loss': loss})}")
    print(f"gradients: {describe_non_finite(grads)}")

    # The step itself, as the run took it; it donates the state, so it comes last.
    _, metrics = run_train_step(state, batch, base_key, setup.context)
    names = ("train/loss", "optim/grad_norm")
    now, seen = ([float(values[name]) for name in names] for values in (metrics, metadata.seen))
    for name, value in zip(names, now, strict=True):
        print(f"{name}: {value} now, {metadata.seen[name]} when the run took it")
    if np.array_equal(now, seen, equal_nan=True):
        print("bit-identical")
    elif metadata.where != (here := device_and_versions(plan.mesh.size)):
        print(f"the run had {metadata.where}; here is {here}")
    return metrics


def describe_non_finite(tree: object) -> str:
    """Names the arrays with values that are not finite, except the guard's record of norms, which may have some."""
    arrays = {name: x for name, x in checkpoint.named_arrays(tree).items() if eqx.is_inexact_array(x)}
    bad = [name for name, x in arrays.items() if name != "guard.norms" and not bool(jnp.isfinite(x).all())]
    shown = ", ".join(bad[:MAX_SHOWN]) + (f" and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else "")
    return f"not finite in {shown}" if bad else "all finite"


def device_and_versions(devices: int) -> str:
    """Hardware and versions that a step is computed with."""
    return f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"


def read_metadata(folder: Path) -> DumpMetadata:
    """Raises `UserError` if the folder has no dump."""
    try:
        return DumpMetadata(**json.loads((folder / METADATA_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has no dump of a step: {METADATA_FILE} cannot be read ({error})") from error


def read_batch(folder: Path, like: Batch | None = None) -> Batch:
    """The global batch, the parts of all processes in order. Raises `UserError` if one is corrupt.

    `like`: any batch of the run's data, for its structure; None: an `ImageBatch`.
    """
    files = sorted(folder.glob("batch_*.npz"), key=lambda path: int(path.stem.split("_")[1]))
    if not files:
        raise UserError(f"{folder} lacks {batch_filename(0)}, the batch of the step")
    parts = [_read_arrays(path) for path in files]
    try:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if like is None:
            return ImageBatch(**arrays)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in batch_arrays(like)])
    except (KeyError, TypeError) as error:
        raise UserError(f"{files[0]} is a batch of other data than the run's: it has {', '.join(parts[0])}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete batch: {error}") from error


def batch_filename(process: int) -> str:
    """Name of the file with this process's part of the batch."""
    return f"batch_{process}.npz"


def batch_arrays(batch: Batch) -> dict[str, AnyArray]:
    """A batch's arrays by name, such as `canvas`, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}
