"""Converts config.json and preprocessor_config.json of a Hugging Face I-JEPA folder to our configs and back.

Source of the keys: transformers, models/ijepa/configuration_ijepa.py and models/bit/image_processing_bit.py. The
latter's processor does what our `center_crop` does; the one that transformers names for I-JEPA distorts the image.
"""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jepax
from jepax.io import config_yaml as configs
from jepax.io.safe_load import printable, read_json
from jepax.nn import ViTConfig
from jepax.nn.kernels import EPSILON
from jepax.nn.pos_embed import sincos_2d
from jepax.nn.stack import Remat
from jepax.types import UserError
from jepax.views import CropConfig

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
SIZE_KEYS = (
    *("patch_size", "num_channels", "hidden_size"),
    *("num_hidden_layers", "num_attention_heads", "intermediate_size"),
)
FIXED_CONFIG = {"model_type": "ijepa", "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": EPSILON}
"""Properties of our `ViT`, which other folders must have."""
PIXEL_CONFIG = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
MAX_SIZE = 2**16
"""Limit of any size in config.json; `weights` compares the sizes with the tensors'."""
PILLOW_RESAMPLE_IDS = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers of our filters."""


@dataclass(frozen=True)
class Provenance:
    """The part "jepax" of our config.json: the encoder's origin, and settings without keys in transformers."""

    recipe: str
    step: int
    encoder: str
    """Its name in the method: target or context."""
    crop: CropConfig
    init_std: float | None
    scan_layers: bool
    remat: Remat
    fast: bool = True
    version: str = jepax.__version__


def write_hf_config(folder: Path, encoder: ViTConfig, crop: CropConfig, *, recipe: str, step: int, name: str) -> None:
    """Writes both files for an encoder called `name` by its method."""
    for field in ("class_token", "learned_grid", "norm_epsilon"):
        found, needed = getattr(encoder, field), getattr(ViTConfig, field)
        if found != needed:
            raise UserError(f"encoder.{field}={found}: the layout of transformers' I-JEPA needs the default, {needed}")
    height, width = crop.size
    hidden = round(encoder.width * encoder.mlp_ratio)
    sides = (encoder.patch_size, encoder.in_channels, encoder.width, encoder.depth, encoder.num_heads, hidden)
    sizes = {"image_size": height if height == width else [height, width], **dict(zip(SIZE_KEYS, sides, strict=True))}
    origin = Provenance(recipe, step, name, crop, encoder.init_std, encoder.scan_layers, encoder.remat, encoder.fast)
    config = {"architectures": ["IJepaModel"], **FIXED_CONFIG, **sizes, "jepax": configs.to_dict(origin)}
    for file, values in ((CONFIG_FILE, config), (PREPROCESSOR_FILE, _preprocessor_config(crop))):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n")


def _preprocessor_config(crop: CropConfig) -> dict[str, Any]:
    """Expresses `center_crop` by transformers' keys: the shorter side is resized to `shortest_edge`, the center cut.

    No keys express a resize that covers a view that is not square. Its images must have the view's size; the model
    refuses others, and the preprocessor only normalizes.
    """
    height, width = crop.size
    is_square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(crop.mean) == 3,
        "do_resize": is_square,
        "size": {"shortest_edge": round(min(crop.size) * crop.eval_resize_ratio)},
        "resample": PILLOW_RESAMPLE_IDS[crop.interpolation],
        "do_center_crop": is_square,
        "crop_size": {"height": height, "width": width},
        **PIXEL_CONFIG,
        "image_mean": list(crop.mean),
        "image_std": list(crop.std),
    }


def load_hf_config(folder: Path) -> tuple[ViTConfig, CropConfig]:
    """Reads the encoder's config and its views' crop, from the part "jepax" or by `_read_crop_config`.

    Raises `UserError` naming file, key and value of a missing entry, and of one that our `ViT` does not support.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    _check_values(path, values, FIXED_CONFIG)
    patch, channels, width, depth, heads, hidden = (_read_size(path, values, key) for key in SIZE_KEYS)
    size, execution = _read_sides(path, values, "image_size"), {}
    with _with_path_in_error(path):
        if "jepax" in values:
            own = configs.from_dict(Provenance, values["jepax"], f"{path}: jepax")
            crop = own.crop
            execution = {name: getattr(own, name) for name in ("init_std", "scan_layers", "remat", "fast")}
        else:
            crop = _read_crop_config(folder / PREPROCESSOR_FILE, size)
        sizes = {"width": width, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / width}
        config = ViTConfig(patch_size=patch, in_channels=channels, **sizes, **execution)
        config.grid(crop.size), sincos_2d((1, 1), config.width)  # refuse sizes that have no such positions
    if crop.size != size:
        raise UserError(f"{path}: image_size={values['image_size']}, but jepax.crop.size={crop.size}; make them equal")
    if len(crop.mean) != channels:
        raise UserError(
            f"{path}: num_channels={channels}, but the pixels' mean is {crop.mean};\n"
            f"give image_mean and image_std of {channels} in {folder / PREPROCESSOR_FILE}"
        )
    return config, crop


@contextlib.contextmanager
def _with_path_in_error(path: Path) -> Iterator[None]:
    """Adds the file to the message of a `UserError` that does not name it."""
    try:
        yield
    except UserError as error:
        if path.name in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


def _read_crop_config(path: Path, size: tuple[int, int]) -> CropConfig:
    """Returns `CropConfig`'s defaults at this size, with mean, std and filter of a preprocessor_config.json.

    The public folders' file differs from their encoders' training: it has 0.5 throughout, transformers' default, but
    I-JEPA's src/transforms.py has ImageNet's. It is used unchanged, with a warning.
    """
    crop = CropConfig(size=size)
    if not path.exists():
        return crop
    values = read_json(path)
    _check_values(path, PIXEL_CONFIG | values, PIXEL_CONFIG)
    filters = {number: name for name, number in PILLOW_RESAMPLE_IDS.items()}
    if (number := values.get("resample", PILLOW_RESAMPLE_IDS[crop.interpolation])) not in filters:
        raise UserError(f"{path}: resample={printable(number)} is neither 2 (bilinear) nor 3 (bicubic)")
    given = {
        key: configs.convert(tuple[float, ...], values[f"image_{key}"], f"image_{key}", str(path))
        for key in ("mean", "std")
        if f"image_{key}" in values
    }
    if len(given.get("mean", ())) == 3 and (given["mean"] != crop.mean or given.get("std", crop.std) != crop.std):
        warnings.warn(
            f"{path}: image_mean={given['mean']} is used, and not ImageNet's mean, which the public I-JEPA was trained"
            " with though its folders say 0.5; remove the file to use ImageNet's",
            stacklevel=4,
        )
    with _with_path_in_error(path):
        return dataclasses.replace(crop, interpolation=filters[number], **given)


def _check_values(path: Path, values: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises `UserError` at the first key that does not have the value of `fixed` (numbers: to a relative 1e-6)."""
    for key, needed in fixed.items():
        value = values.get(key, "absent")
        near = isinstance(needed, float) and isinstance(value, float) and math.isclose(value, needed, rel_tol=1e-6)
        if not near and (value != needed or type(value) is not type(needed)):
            raise UserError(
                f"{path}: {key}={printable(value)} is not supported; jepax reads encoders with {key}={needed} only"
            )


def _read_size(path: Path, values: dict[str, Any], key: str) -> int:
    """Reads a size of at least 1; a square one may be written as two equal sides."""
    first, second = _read_sides(path, values, key)
    if first != second:
        raise UserError(f"{path}: {key}={printable(values[key])} is not square; jepax reads square ones only")
    return first


def _read_sides(path: Path, values: dict[str, Any], key: str) -> tuple[int, int]:
    """Reads height and width, each at least 1; one number means both."""
    value = values.get(key)
    if value is None:
        raise UserError(f"{path}: {key} is missing; fetch or export it again")
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    for side in sides:
        if not 1 <= configs.convert(int, side, key, str(path)) <= MAX_SIZE:
            raise UserError(f"{path}: {key}={value} must be at least 1 and at most {MAX_SIZE}")
    return sides[0], sides[1]
