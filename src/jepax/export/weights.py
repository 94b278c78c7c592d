"""Writes and reads encoders as folders in the layout of transformers' `IJepaModel`.

Source of names and layouts: transformers, models/ijepa/modeling_ijepa.py, as `save_pretrained` writes them.
"""

import contextlib
import shutil
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jepax.export import huggingface
from jepax.io.safe_load import printable
from jepax.nn import ViT, ViTConfig
from jepax.nn.pos_embed import sincos_2d
from jepax.trees import cast
from jepax.types import UserError
from jepax.views import CropConfig

MODEL_FILE = "model.safetensors"
POS_EMBED_NAME, PATCH_EMBED_NAME = "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"
UNSTACKED_MODULES = {"embed": PATCH_EMBED_NAME, "norm": "layernorm"}
BLOCK_MODULES = {
    "norm1": ["layernorm_before"],
    "attention.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "attention.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
"""Modules of transformers by ours, which concatenate their outputs."""
UNSUPPORTED_SUFFIXES = tuple(".bin .pt .pth .pth.tar .ckpt .pkl .pickle .npy .npz .h5 .msgpack".split())
"""Formats of weights that are never opened: reading some of them runs code in them."""
MAX_HEADER_BYTES = 10_000_000
"""Most bytes of a safetensors file's list of tensors; the largest ViT's has a hundredth."""
POS_EMBED_TOLERANCE = 1e-4
"""Largest difference of a file's positions from our table, plus the rounding of their type."""


def export(folder: Path, encoder: ViT, crop: CropConfig, *, recipe: str, step: int, name: str) -> None:
    """Writes the encoder, called `name` by its method, as a new folder, atomically.

    Raises `UserError` if the folder exists and is not empty.
    """
    target = folder.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{folder} exists already; name another folder, or remove it")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        huggingface.write_hf_config(part, encoder.config, crop, recipe=recipe, step=step, name=name)
        tensors = named_tensors(cast(encoder, jnp.float32), crop.size)
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(tensors, part / MODEL_FILE, metadata={"format": "pt"})
        # safetensors makes its file readable by its owner only.
        shutil.copymode(part / huggingface.CONFIG_FILE, part / MODEL_FILE)
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def load_encoder(folder: Path) -> tuple[ViT, CropConfig]:
    """Reads an encoder that `export` or others wrote, in float32, and the crop that makes its views.

    Our config.json has the crop. Other folders have its size, and its mean, std and filter if they have a
    preprocessor_config.json; the rest is `CropConfig`'s default. Raises `UserError` if tensors are missing, surplus,
    of another shape or not finite, and if the model is not our `ViT`, with its fixed sine-cosine positions. Memory is
    allocated for tensors in the file, never for sizes that only config.json has.
    """
    check_format(folder)
    config, crop = huggingface.load_hf_config(folder)
    _check_sizes(folder / MODEL_FILE, config, crop.size)
    shapes = eqx.filter_eval_shape(ViT, config, key=jr.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)  # uses no memory
    return _with_tensors(shapes, _read_tensors(folder / MODEL_FILE, named_tensors(zeros, crop.size))), crop


def _tensor_names(depth: int) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the path of each array of ours, and for each layer the names of the tensors that it concatenates."""
    for kind in ("weight", "bias"):
        for ours, theirs in UNSTACKED_MODULES.items():
            yield f"{ours}.{kind}", [[f"{theirs}.{kind}"]]
        for ours, parts in BLOCK_MODULES.items():
            layers = [[f"encoder.layer.{i}.{part}.{kind}" for part in parts] for i in range(depth)]
            yield f"stack.blocks.{ours}.{kind}", layers


def named_tensors(encoder: ViT, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns the parameters by transformers' names, in its layouts, and the positions of views of `size`.

    A linear weight is (outputs, inputs) there; the patches' embedding is a convolution's (dim, channels, row, column).
    """
    config = encoder.config
    patch, kernel_name = config.patch_size, f"{PATCH_EMBED_NAME}.weight"
    found = {POS_EMBED_NAME: sincos_2d(config.grid(size), config.width)[None]}
    for path, layers in _tensor_names(config.depth):
        array = np.asarray(attrgetter(path)(encoder))
        for layer, names in zip(array if path.startswith("stack.") else array[None], layers, strict=True):
            found |= zip(names, np.split(layer.T, len(names)), strict=True)
    kernel = found[kernel_name].reshape(config.width, patch, patch, config.in_channels)
    return found | {kernel_name: kernel.transpose(0, 3, 1, 2)}


def _with_tensors(encoder: ViT, tensors: dict[str, np.ndarray]) -> ViT:
    """Returns the encoder with these parameters: the inverse of `named_tensors`."""
    kernel = tensors[f"{PATCH_EMBED_NAME}.weight"].transpose(0, 2, 3, 1)
    tensors = tensors | {f"{PATCH_EMBED_NAME}.weight": kernel.reshape(len(kernel), -1)}
    for path, layers in _tensor_names(encoder.config.depth):
        arrays = [np.concatenate([tensors[name] for name in names]).T for names in layers]
        array = np.stack(arrays) if path.startswith("stack.") else arrays[0]
        encoder = eqx.tree_at(attrgetter(path), encoder, jnp.asarray(array))
    return encoder


def check_format(path: Path) -> None:
    """Raises `UserError` for a file of weights in another format, and for a folder of such files without ours."""
    files = sorted(path.iterdir()) if path.is_dir() and not (path / MODEL_FILE).exists() else [path]
    for file in files:
        if file.is_file() and file.name.lower().endswith(UNSUPPORTED_SUFFIXES):
            raise UserError(
                f"{file} is not read: jepax reads safetensors only, from a folder that contains {MODEL_FILE},\n"
                "since a pickled file runs whatever code is in it; if you trust the file, convert it with\n"
                "transformers: IJepaModel.from_pretrained(...).save_pretrained(FOLDER, safe_serialization=True)"
            )


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[tuple[Any, frozenset[str]]]:
    """Opens the safetensors file, with its tensors' names. Raises `UserError` if it is missing or incomplete."""
    try:
        with path.open("rb") as file:
            if (length := int.from_bytes(file.read(8), "little")) > MAX_HEADER_BYTES:
                raise UserError(f"{path} is no complete safetensors file: {length} bytes of header")
        with safe_open(path, framework="numpy") as file:
            yield file, frozenset(file.keys())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; weights are read from one safetensors file of this name") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no complete safetensors file: {error}; fetch or export it again") from error


def _check_sizes(path: Path, config: ViTConfig, size: tuple[int, int]) -> None:
    """Raises `UserError` if a size in config.json is not that of the tensors, before anything of that size is built.

    The file must have every byte of every tensor that it lists, so a valid one needs no more memory than the file.
    """
    rows, columns = config.grid(size)
    fc1 = f"encoder.layer.{config.depth - 1}.{BLOCK_MODULES['mlp.fc1'][0]}.weight"
    shapes = {
        POS_EMBED_NAME: [1, rows * columns, config.width],
        f"{PATCH_EMBED_NAME}.weight": [config.width, config.in_channels, config.patch_size, config.patch_size],
        fc1: [round(config.width * config.mlp_ratio), config.width],
    }
    with _open_safetensors(path) as (file, names):
        for name in shapes:
            _check_shape(path, file, names, name, shapes)
        if config.depth > len(names):
            raise UserError(f"{path} has {len(names)} tensors, too few for {config.depth} layers by config.json")


def _check_shape(path: Path, file: Any, names: frozenset[str], name: str, shapes: dict[str, list[int]]) -> None:
    """Raises `UserError` if the file's tensor of this name is missing, surplus, or not of the shape in `shapes`."""
    found = file.get_slice(name).get_shape() if name in names else "absent"
    if found != (expected := shapes.get(name, "absent")):
        raise UserError(
            f"{path}: {printable(name, 100)} is {found}, and by config.json should be {expected};\n"
            "give the config.json of these weights, of an IJepaModel without classifier or pooler"
        )


def _read_tensors(path: Path, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads the tensors in float32; names and shapes, and the values of the positions, must be those of `expected`.

    Raises `UserError` at the first tensor that differs, is of no float type, or is not finite.
    """
    shapes = {name: list(value.shape) for name, value in expected.items()}
    with _open_safetensors(path) as (file, names):
        for name in sorted(names | shapes.keys()):
            _check_shape(path, file, names, name, shapes)
            if (dtype := file.get_slice(name).get_dtype()) not in ("F32", "F16", "BF16"):
                raise UserError(f"{path}: {name} is {dtype}; save it as float32, float16 or bfloat16")
        found = {name: file.get_tensor(name) for name in shapes}
    rounding = float(jnp.finfo(found[POS_EMBED_NAME].dtype).eps) / 2
    found = {name: value.astype(np.float32, copy=False) for name, value in found.items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} has values that are not finite; fetch or export it again")
    error = float(np.max(np.abs(found[POS_EMBED_NAME] - expected[POS_EMBED_NAME])))
    if error > POS_EMBED_TOLERANCE + rounding:
        raise UserError(
            f"{path}: {POS_EMBED_NAME} differ by {error:.2g} from our ViT's fixed sine-cosine table;\n"
            "take a model whose positions were neither trained nor interpolated"
        )
    return found
