"""Checkpoints: Orbax writes the arrays, a manifest of sha256 sums written last says that they are whole.

A checkpoint grows in STEP.part and is renamed to STEP when its manifest is on the disk. So a folder STEP that is not as
its manifest says was damaged later, and one called STEP.part was never finished.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import PyTree

from jepax import files, manifest
from jepax.distributed import multihost
from jepax.types import UserError

T = TypeVar("T")
ARRAYS, NOTE = "arrays", "note.json"
PART, DAMAGED = ".part", ".damaged"
LONGEST = 240
"""Characters of an error that are shown."""
ALL = ("",)
"""What every array's name begins with."""


def abstract(tree: PyTree) -> PyTree:
    """The tree with each array's shape, type and place instead of the array: what `restore` needs, without memory."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if eqx.is_array(x) else x, tree
    )


def named(tree: object) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The tree's arrays, or abstract ones, under names such as `method.encoder.norm.weight`."""
    found = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _is_array))
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in found}


def _is_array(x: object) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _forms(tree: object) -> dict[str, str]:
    """Type and shape of each named array, such as `float32[192,576]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for name, leaf in named(tree).items()}


def digest(tree: object) -> str:
    """sha256 over the names, types, shapes and bytes of every array: equal for equal states alone.

    Arrays must be addressable from this process.
    """
    whole = hashlib.sha256()
    for (name, form), array in zip(_forms(tree).items(), named(tree).values(), strict=True):
        whole.update(f"{name} {form}\n".encode())
        whole.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return whole.hexdigest()


class Writing:
    """A checkpoint on its way to the disk. The tree may be donated, or changed, as soon as this is made.

    Every process of a run makes one; the first of them finishes it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        tree: object,
        note: dict[str, Any] | None = None,
        *,
        first: Callable[[], None] = lambda: None,
        then: Callable[[], None] = lambda: None,
    ):
        """`note`: kept beside the arrays. `first` and `then`: called in the first process, before the checkpoint
        counts as finished and after."""
        self.step, self.path = step, folder.absolute() / f"{step:08d}"
        self._part, self._error = self.path.with_name(self.path.name + PART), None
        self._note, self._arrays, self._calls = note or {}, _forms(tree), (first, then)
        try:
            with multihost.translate_peer_errors():
                self._begin(tree)
        except multihost.PeerLostError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def _begin(self, tree: object) -> None:
        if multihost.is_main_process():
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        multihost.all_gather_str("")  # the folder is there
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly shrink: by a tenth
        with context:
            self._response = ocp.save_async(self._part / ARRAYS, named(tree))

    def _finish(self) -> None:
        try:
            with multihost.translate_peer_errors():
                self._response.result()
            if multihost.is_main_process():
                first, then = self._calls
                first()
                self._commit()
                then()
        except Exception as error:  # whatever it is: it is raised where the run waits for this checkpoint
            self._error = error

    def _commit(self) -> None:
        (self._part / NOTE).write_text(json.dumps(self._note) + "\n")
        manifest.write(self._part, {"step": self.step, "arrays": self._arrays})
        if self.path.exists():
            shutil.rmtree(self.path)
        self._part.rename(self.path)
        files.sync(self.path.parent)

    def _failed(self, error: Exception) -> UserError:
        _remove(self._part)
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > LONGEST:
            reason = f"{reason[: LONGEST // 3]} ... {reason[-2 * LONGEST // 3 :]}"  # the system's own words end it
        return UserError(
            f"checkpoint {self.path} could not be written: {reason};\n"
            "the ones before it are as they were: mend the cause, and the same command goes on"
        )

    def done(self) -> bool:
        """Whether it is on the disk, or has failed."""
        return not self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Waits until it is on the disk or has failed, but no longer than this."""
        self._thread.join(seconds)

    def result(self) -> Path:
        """Waits until it is on the disk. Raises `UserError` where it could not be written; nothing of it remains.
        Raises `multihost.PeerLostError` where another process did not write its part."""
        self._thread.join()
        if isinstance(self._error, multihost.PeerLostError):
            raise self._error
        if self._error is not None:
            raise self._failed(self._error) from self._error
        return self.path


def _remove(folder: Path) -> None:
    """Takes away what a failed save left, also where the threads that write it are not at their end yet: they may make
    it anew, so it has to be gone three times in a row."""
    gone = 0
    for _ in range(30):
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        if gone == 3:
            return
        time.sleep(0.1)


def save(folder: Path, step: int, tree: object, note: dict[str, Any] | None = None) -> Path:
    """Writes `folder`/STEP and waits for it. Returns its path."""
    return Writing(folder, step, tree, note).result()


def steps(folder: Path) -> list[int]:
    """Steps, ascending, of the checkpoints that were finished; whether they are sound, `problems` tells."""
    return sorted(int(entry.name) for entry in _entries(folder) if entry.name.isdecimal() and entry.is_dir())


def unfinished(folder: Path) -> list[Path]:
    """Folders of checkpoints whose writing was cut off."""
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.name.endswith(PART))


def _entries(folder: Path) -> list[os.DirEntry]:
    """None where the folder is missing; where it cannot be read that is an error, or training would begin anew."""
    try:
        return list(os.scandir(folder))
    except FileNotFoundError:
        return []


def problems(folder: Path, step: int) -> list[str]:
    """What is wrong with a checkpoint, in words; nothing, if it is what was written."""
    return manifest.problems(folder / f"{step:08d}")


def note(folder: Path, step: int) -> dict[str, Any]:
    """What was saved beside the arrays."""
    return json.loads((folder / f"{step:08d}" / NOTE).read_text())


@dataclass(frozen=True)
class Sound:
    """The newest checkpoint that is sound, and what was found wrong with newer ones."""

    step: int | None
    damaged: dict[int, list[str]]


def newest_sound(folder: Path) -> Sound:
    """Reads checkpoints from the newest on until one is sound. Changes nothing.

    Raises `UserError` where there are checkpoints and none is sound.
    """
    damaged: dict[int, list[str]] = {}
    for step in reversed(steps(folder)):
        found = problems(folder, step)
        if not found:
            return Sound(step, damaged)
        damaged[step] = found
    if damaged:
        step, names = max(damaged), ", ".join(f"{step:08d}" for step in damaged)
        raise UserError(
            f"no checkpoint in {folder} is sound, damaged are {names}; of {step:08d}: {damaged[step][0]}\n"
            "nothing was removed and nothing is trained: bring back a sound copy, or begin anew in another --run-dir"
        )
    return Sound(None, {})


def set_aside(folder: Path, damaged: dict[int, list[str]]) -> None:
    """Renames damaged checkpoints, so that they are neither taken nor counted; nothing is removed."""
    for step in damaged:
        path = folder / f"{step:08d}"
        target = path.with_name(path.name + DAMAGED)
        for number in range(2, 1000):
            if not target.exists():
                break
            target = path.with_name(f"{path.name}{DAMAGED}{number}")
        path.rename(target)


def restore(folder: Path, step: int, like: T, *, verify: bool = True, only: tuple[str, ...] = ALL) -> T:
    """The tree `like`, which may be `abstract`, with the arrays of `step`, on the devices where `like`'s lie.

    `only`: what the names of arrays that are read begin with; the others are None. A large tree is best given
    abstract, or its arrays and the checkpoint's are held at once. Raises `UserError` where a file differs from the
    manifest, or where the arrays' names or shapes, read or not, are not `like`'s.
    """
    path = folder.absolute() / f"{step:08d}"
    if verify and (found := problems(folder, step)):
        raise UserError(
            f"checkpoint {path} is damaged: {found[0]} ({len(found)} such files);\n"
            f"there are {', '.join(map(str, steps(folder)))}: --step takes another"
        )
    _refuse_other_model(path, manifest.content(path)["arrays"], _forms(like))
    arrays, rest = eqx.partition(abstract(like), _is_array)
    names = named(arrays)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = ocp.load(path / ARRAYS, {name: x for name, x in names.items() if name.startswith(only)})
    restored = jax.tree.unflatten(jax.tree.structure(arrays), [loaded.get(name) for name in names])
    return eqx.combine(restored, rest)


def _refuse_other_model(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    if different := sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name)):
        name = different[0]
        raise UserError(
            f"checkpoint {path} holds another model than this config builds, {len(different)} arrays differ:\n"
            f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        )
