"""Saves and reads a dump of a step: the state before it, its batch, the config, and what came out."""

import dataclasses
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jepax.data.sources import Batch
from jepax.distributed import multihost
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.optim import Optimizer
from jepax.training.config import CONFIG_FILE, Config, resolve_compute_dtype
from jepax.training.monitor import NonFiniteError
from jepax.training.step import TrainState
from jepax.types import AnyArray, ImageBatch, UserError

METADATA_FILE, STATE_DIR = "dump.json", "state"
MAX_BATCH_BYTES = 2**34


@dataclass(frozen=True)
class DumpMetadata:
    """What a step needs besides state, batch and config, and what it gave."""

    step: int
    total_steps: int
    warmup_steps: int
    where: str
    """Devices and versions of the run."""
    seen: dict[str, float | str]
    """Loss and gradient norm; text where they are not finite."""


def write_dump(run: Path, state: TrainState, end: NonFiniteError, config: Config, optimizer: Optimizer) -> Path:
    """Writes `run`/dumps/step_N. `state` may be later than that step, if no step from there on changed it."""
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

    # Each process writes its part of the batch.
    np.savez(folder / batch_filename(jax.process_index()), **batch_arrays(end.batch))

    if multihost.is_main_process():
        where = device_and_versions(jax.device_count())
        metadata = DumpMetadata(step, optimizer.total_steps, optimizer.warmup_steps, where, end.numbers)
        (folder / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(metadata), indent=1) + "\n")
        train = dataclasses.replace(config.train, compute_dtype=jnp.dtype(resolve_compute_dtype(config)).name)
        configs.save(dataclasses.replace(config, train=train), folder / CONFIG_FILE)
    return folder


def batch_filename(process: int) -> str:
    """Returns the name of the file with this process's part of the batch."""
    return f"batch_{process}.npz"


def device_and_versions(devices: int) -> str:
    """Names what a step is computed with."""
    return f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"


def read_metadata(folder: Path) -> DumpMetadata:
    """Raises `UserError` where the folder has no dump."""
    try:
        return DumpMetadata(**json.loads((folder / METADATA_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has no dump of a step: {METADATA_FILE} cannot be read ({error})") from error


def read_batch(folder: Path, like: Batch | None = None) -> Batch:
    """Returns the global batch, the parts of all processes in order. Raises `UserError` if one is corrupt.

    `like`: any batch of the run's data, for its structure; None: an `ImageBatch`.
    """
    files = sorted(folder.glob("batch_*.npz"), key=lambda path: int(path.stem.split("_")[1]))
    if not files:
        raise UserError(f"{folder} lacks {batch_filename(0)}, the batch of the step")
    parts = [_read_batch_file(path) for path in files]
    try:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if like is None:
            return ImageBatch(**arrays)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in batch_arrays(like)])
    except (KeyError, TypeError) as error:
        raise UserError(f"{files[0]} is a batch of other data than the run's: it has {', '.join(parts[0])}") from error


def batch_arrays(batch: Batch) -> dict[str, AnyArray]:
    """Returns a batch's arrays by name, such as `canvas`, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}


def _read_batch_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:  # the sizes are read before anything is unpacked
            size = sum(entry.file_size for entry in archive.infolist())
        if size <= MAX_BATCH_BYTES:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is no complete batch: {error}") from error
    raise UserError(f"{path} claims to hold {size} bytes, more than any batch; it is not read")
