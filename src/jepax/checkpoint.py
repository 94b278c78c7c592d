"""Checkpoints: Orbax writes the arrays, a manifest of sha256 sums written last says that they are whole."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TypeVar

import equinox as eqx
import jax
import orbax.checkpoint.experimental.v1 as ocp

from jepax.types import UserError

T = TypeVar("T")
MANIFEST = "manifest.json"
ARRAYS = "arrays"


def _named(tree: object) -> dict[str, jax.Array]:
    """The tree's arrays under names such as `method.encoder.norm.weight`."""
    found = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in found}


def _forms(tree: object) -> dict[str, str]:
    """Type and shape of each named array, such as `float32[192,576]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for name, leaf in _named(tree).items()}


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, step: int, tree: object, *, keep: int) -> Path:
    """Writes `folder`/STEP and then removes all but the newest `keep` whole checkpoints. Returns its path."""
    path = folder.absolute() / f"{step:08d}"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    ocp.save(path / ARRAYS, _named(tree))
    part = path / (MANIFEST + ".part")
    manifest = {"step": step, "arrays": _forms(tree), "sha256": _sums(path)}
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    part.replace(path / MANIFEST)
    for old in whole_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{old:08d}")
    return path


def whole_steps(folder: Path) -> list[int]:
    """Steps, ascending, of the checkpoints that were written to their end (one without a manifest was not)."""
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{MANIFEST}") if path.parent.name.isdigit())


def restore(folder: Path, step: int, like: T) -> T:
    """The tree `like` with the arrays of `step`, on the devices where `like`'s lie.

    Raises `UserError` where a file differs from the manifest, or where the arrays' names or shapes are not `like`'s.
    """
    path = folder.absolute() / f"{step:08d}"
    manifest = json.loads((path / MANIFEST).read_text())
    found = _sums(path)
    if damaged := sorted(name for name, value in manifest["sha256"].items() if found.get(name) != value):
        raise UserError(
            f"checkpoint {path} is damaged: {damaged[0]} is not what was written ({len(damaged)} such files);\n"
            "remove that folder to resume from the checkpoint before it"
        )
    saved, wanted = manifest["arrays"], _forms(like)
    if different := sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name)):
        name = different[0]
        raise UserError(
            f"checkpoint {path} holds another model than this config builds, {len(different)} arrays differ:\n"
            f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        )
    arrays, rest = eqx.partition(like, eqx.is_array)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(arrays))
    loaded = ocp.load(path / ARRAYS, abstract)
    restored = jax.tree.unflatten(jax.tree.structure(arrays), [loaded[name] for name in _named(arrays)])
    return eqx.combine(restored, rest)
