"""A step on disk, with all that it was taken from: the state before it, its batch, the config, and what it gave."""

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

from jepax import checkpoint
from jepax import config as configs
from jepax.distributed import multihost
from jepax.monitor import NotFinite
from jepax.optim import Optimizer
from jepax.settings import CONFIG, Config, compute_dtype
from jepax.step import TrainState
from jepax.types import Images, UserError

FACTS, STATE = "dump.json", "state"
PARTS = ("canvas", "size", "index", "label")
LARGEST = 2**34
"""Bytes of a batch; what claims to hold more is not read."""


@dataclass(frozen=True)
class Facts:
    """What a step needs beside state, batch and config, and what was seen of it."""

    step: int
    total_steps: int
    warmup_steps: int
    where: str
    """What took it: see `where`."""
    seen: dict[str, float | str]
    """Loss and gradient norm; text where they are not finite."""


def batch_file(process: int) -> str:
    """Name of the file with the part of the batch that this process read."""
    return f"batch_{process}.npz"


def write(run: Path, state: TrainState, end: NotFinite, config: Config, optimizer: Optimizer) -> Path:
    """Writes `run`/dumps/step_N. `state` may be later than that step, if no step from there on changed it."""
    step, images = end.step, end.images
    folder = run / "dumps" / f"step_{step:08d}"
    if multihost.is_main_process():  # a part of a batch that more processes left would count as one of this
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    in_a_row = jnp.minimum(state.guard.in_a_row, config.train.guard.patience - 1)
    before = eqx.tree_at(lambda s: (s.step, s.guard.in_a_row), state, (jnp.full_like(state.step, step), in_a_row))
    checkpoint.save(folder / STATE, step, before)
    arrays = {name: np.asarray(getattr(images, name)) for name in PARTS if getattr(images, name) is not None}
    np.savez(folder / batch_file(jax.process_index()), **arrays)
    if multihost.is_main_process():
        told = {"step": step, "total_steps": optimizer.total_steps, "warmup_steps": optimizer.warmup_steps}
        told |= {"where": where(jax.device_count()), "seen": end.numbers}
        (folder / FACTS).write_text(json.dumps(told, indent=1) + "\n")
        train = dataclasses.replace(config.train, precision=jnp.dtype(compute_dtype(config)).name)
        configs.dump(dataclasses.replace(config, train=train), folder / CONFIG)
    return folder


def where(devices: int) -> str:
    """Devices and versions that a step is taken with."""
    return f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"


def read_facts(folder: Path) -> Facts:
    """Raises `UserError` where the folder holds no dump."""
    try:
        return Facts(**json.loads((folder / FACTS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no dump of a step: {FACTS} cannot be read ({error})") from error


def read_images(folder: Path) -> Images:
    """The whole batch, of all processes in order. Raises `UserError` where a file is missing or damaged."""
    files = sorted(folder.glob("batch_*.npz"), key=lambda path: int(path.stem.split("_")[1]))
    if not files:
        raise UserError(f"{folder} lacks {batch_file(0)}, the batch of the step")
    parts = [_read_part(path) for path in files]
    return Images(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _read_part(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > LARGEST:
            raise UserError(f"{path} claims to hold {claimed} bytes, more than any batch; it is not read")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in PARTS if name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no whole batch: {error}") from error
