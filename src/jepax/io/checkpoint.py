"""Checkpoints: Orbax writes the arrays; a manifest of sha256 sums, written last, proves that they are complete.

A checkpoint is written to STEP.part and renamed to STEP when its manifest is on the disk. So a STEP.part is
unfinished, and a STEP that differs from its manifest was corrupted later.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import orbax.checkpoint.experimental.v1 as ocp

from jepax.distributed import multihost
from jepax.io import atomic, checksums
from jepax.types import UserError

T = TypeVar("T")
ARRAYS_DIR, METADATA_FILE = "arrays", "metadata.json"
PARTIAL_SUFFIX, CORRUPT = ".part", ".corrupt"
MAX_ERROR_CHARS = 240
ALL_ARRAYS = ("",)
"""Prefix of every array's name."""


def save_async(
    folder: Path,
    step: int,
    tree: object,
    metadata: dict[str, Any] | None = None,
    *,
    before_commit: Callable[[], None] = lambda: None,
    after_commit: Callable[[], None] = lambda: None,
) -> Future[Path]:
    """Start to write `folder`/STEP on a thread. The tree may be donated or changed once this returns.

    Every process of a run calls it; the main process commits, and calls `before_commit` and `after_commit`, on the
    thread. `metadata`: JSON, saved with the arrays. Raises, here or as the future's exception, `UserError` if the
    checkpoint could not be written (nothing of it remains), `PeerLostError` if another process is gone.
    """
    path, names = step_dir(folder, step).absolute(), named_arrays(tree)
    part, forms, link = path.with_name(path.name + PARTIAL_SUFFIX), _signatures(names), ExitStack()

    # Orbax copies the arrays to the host here, in the caller's thread, and writes them in its own.
    with _cleaned_up_on_error(path, part):
        if multihost.is_main_process():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        multihost.all_gather_str("")  # the folder exists from here on
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights compress by a tenth only
        # Each device of a replica copies a slice, and each slice compiles a program of its own: large arrays only.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**22
        arrays = link.enter_context(_literal_path(part)) / ARRAYS_DIR
        with context:
            response = ocp.save_async(arrays, names)

    # Once written, the arrays' headers are read. The manifest comes last; the rename makes the checkpoint count.
    def finish() -> Path:
        with _cleaned_up_on_error(path, part), link:
            response.result()
            if multihost.is_main_process():
                if _signatures(ocp.metadata(arrays).metadata or {}) != forms:
                    raise OSError("it was written, but cannot be read")
                before_commit()
                (part / METADATA_FILE).write_text(json.dumps(metadata or {}) + "\n")
                checksums.write_manifest(part, {"step": step, "arrays": forms})
                if path.exists():
                    shutil.rmtree(path)
                part.rename(path)
                atomic.fsync(path.parent)
                after_commit()
        return path

    executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = executor.submit(finish)
    executor.shutdown(wait=False)  # it ends with its only task
    return future


@contextmanager
def _literal_path(folder: Path) -> Iterator[Path]:
    """The folder, or a link to it if Orbax or TensorStore would read its name as another one.

    Orbax takes a path as a glob pattern; TensorStore takes a backslash as a slash, and refuses what is not UTF-8.
    """
    if not re.search(r"[*?\[\\\udc80-\udcff]", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jepax-") as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(folder)
        yield link


def save(folder: Path, step: int, tree: object, metadata: dict[str, Any] | None = None) -> Path:
    """Write `folder`/STEP, wait for it, and return its path."""
    return save_async(folder, step, tree, metadata).result()


@contextmanager
def _cleaned_up_on_error(path: Path, part: Path) -> Iterator[None]:
    try:
        with multihost.translate_peer_errors():
            yield
    except multihost.PeerLostError:
        raise
    except Exception as error:
        _remove_partial(part)
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > MAX_ERROR_CHARS:  # the cause is at its end
            reason = f"{reason[: MAX_ERROR_CHARS // 3]} ... {reason[-2 * MAX_ERROR_CHARS // 3 :]}"
        raise UserError(
            f"checkpoint {path} could not be written: {reason};\n"
            "the ones before it are unchanged: fix the cause and rerun"
        ) from error


def _remove_partial(folder: Path) -> None:
    """Remove a failed save. Its running threads may create it again, so it must be absent three times."""
    gone = 0
    for _ in range(30):
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        if gone == 3:
            return
        time.sleep(0.1)


def restore(folder: Path, step: int, like: T, *, check: bool = True, only: tuple[str, ...] = ALL_ARRAYS) -> T:
    """Return `like` with the arrays of `step`, on the devices of `like`'s.

    `only`: prefixes of the names of the arrays that are read; the others are None. Give a large tree as shapes, or its
    arrays and the checkpoint's are in memory together. Raises `UserError` if a file differs from the manifest, or if
    the names or shapes of arrays, read or not, are not `like`'s.
    """
    path = step_dir(folder, step).absolute()
    if check and (problems := verify(folder, step)):
        raise UserError(
            f"checkpoint {path} is corrupt: {problems[0]} ({len(problems)} such files);\n"
            f"available: {', '.join(map(str, list_steps(folder)))}; --step selects another"
        )

    # The same model: names, types and shapes of all arrays.
    saved, expected = checksums.read_content(path)["arrays"], _signatures(named_arrays(like))
    if different := sorted(name for name in saved | expected if saved.get(name) != expected.get(name)):
        name = different[0]
        raise UserError(
            f"checkpoint {path} is of another model than this config builds, {len(different)} arrays differ:\n"
            f"{name} is {saved.get(name, 'absent')} there and {expected.get(name, 'absent')} here"
        )

    # Orbax reads them by name, without holding those of `like`.
    arrays, rest = eqx.partition(like, _is_array)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    names = named_arrays(shapes)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, _literal_path(path) as literal:
        loaded = ocp.load(literal / ARRAYS_DIR, {name: x for name, x in names.items() if name.startswith(only)})
    restored = jax.tree.unflatten(jax.tree.structure(shapes), [loaded.get(name) for name in names])
    return eqx.combine(restored, rest)


def step_dir(folder: Path, step: int) -> Path:
    """The checkpoint's folder."""
    return folder / f"{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps, ascending, of finished checkpoints, valid or not. A folder that cannot be read is an error."""
    try:
        return sorted(int(entry.name) for entry in os.scandir(folder) if entry.name.isdecimal() and entry.is_dir())
    except FileNotFoundError:
        return []


def partial_checkpoints(folder: Path) -> list[Path]:
    """Folders of unfinished checkpoints."""
    return sorted(folder.glob(f"*{PARTIAL_SUFFIX}"))


def verify(folder: Path, step: int) -> list[str]:
    """List the errors of a checkpoint; empty if it is as written."""
    return checksums.verify(step_dir(folder, step))


def metadata(folder: Path, step: int) -> dict[str, Any]:
    """The metadata saved with the arrays."""
    return json.loads((step_dir(folder, step) / METADATA_FILE).read_text())


def latest_valid(folder: Path) -> tuple[int | None, dict[int, list[str]]]:
    """Return the newest valid checkpoint's step, and the errors of newer ones. Changes nothing.

    Raises `UserError` if there are checkpoints and none is valid.
    """
    corrupt: dict[int, list[str]] = {}
    for step in reversed(list_steps(folder)):
        if not (problems := verify(folder, step)):
            return step, corrupt
        corrupt[step] = problems
    if corrupt:
        step, names = max(corrupt), ", ".join(f"{step:08d}" for step in corrupt)
        raise UserError(
            f"no checkpoint in {folder} is valid, corrupt are {names}; of {step:08d}: {corrupt[step][0]}\n"
            "nothing was removed or trained: bring back a valid copy, or start again in another --run-dir"
        )
    return None, {}


def quarantine(folder: Path, corrupt: Iterable[int]) -> None:
    """Rename corrupt checkpoints to STEP.corrupt, so that they are neither read nor counted; removes nothing."""
    for path in (step_dir(folder, step) for step in corrupt):
        targets = (path.with_name(f"{path.name}{CORRUPT}{number}") for number in ("", *range(2, 1000)))
        path.rename(next(target for target in targets if not target.exists()))


def named_arrays(tree: object) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The tree's arrays, or their shapes, by names such as `method.encoder.norm.weight`."""
    found = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in found}


def _is_array(x: object) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _signatures(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Type and shape of each array, such as `float32[192,576]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for name, leaf in arrays.items()}
