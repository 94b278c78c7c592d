"""Reads recorded reference numbers into our modules: names and layouts of the public checkpoint format."""

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jepax.masking import MultiBlockConfig
from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.nn import PredictorConfig, ViTConfig
from jepax.types import Masks
from jepax.views import CropConfig, MaskedViews

GOLDEN = Path(os.environ.get("JEPAX_GOLDEN", Path(__file__).parent.parent / "golden"))

BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
WHOLE = {
    "encoder": {"patch_embed.proj": "embed", "norm": "norm"},
    "predictor": {"predictor_embed": "embed", "predictor_norm": "norm", "predictor_proj": "proj"},
}
PREFIX = {"encoder": "blocks", "predictor": "predictor_blocks"}


def method_of(golden: dict[str, np.ndarray]) -> IJEPA:
    """An I-JEPA of the file's sizes, before its parameters are put in."""
    c = {name.removeprefix("config."): int(value) for name, value in golden.items() if name.startswith("config.")}
    heads, channels = c["num_heads"], golden["step0.images"].shape[1]
    config = IJEPAConfig(
        encoder=ViTConfig(
            patch_size=c["patch_size"], width=c["embed_dim"], depth=c["depth"], num_heads=heads, in_channels=channels
        ),
        predictor=PredictorConfig(width=c["predictor_dim"], depth=c["predictor_depth"], num_heads=heads),
        masks=MultiBlockConfig(num_context_patches=1),
        crop=CropConfig(size=(c["crop_size"], c["crop_size"])),
    )
    return IJEPA(config, total_steps=c["total_steps"], key=jr.key(0))


def masks_of(golden: dict[str, np.ndarray], step: int) -> Masks:
    """The masks of one step; the files hold (blocks, batch, target), we hold (batch, blocks, target)."""
    context = golden[f"step{step}.context_indices"][0]
    targets = np.swapaxes(golden[f"step{step}.target_indices"], 0, 1)
    return Masks(jnp.asarray(context, jnp.int32), jnp.asarray(targets, jnp.int32), jnp.ones(targets.shape, bool))


def views_of(golden: dict[str, np.ndarray], step: int) -> MaskedViews:
    """The images and masks of one step."""
    images = jnp.asarray(golden[f"step{step}.images"].transpose(0, 2, 3, 1))
    return MaskedViews(images, masks_of(golden, step))


def group(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The file's entries under `prefix`, less the fixed position tables."""
    found = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if not name.endswith("pos_embed")}


def _places(kind: str, depth: int) -> Iterator[tuple[str, list[str]]]:
    """Each attribute path of ours, with the public names whose arrays it holds: one, or one per stacked layer."""
    for public, ours in WHOLE[kind].items():
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", [f"{public}.{part}"]
    for public, ours in BLOCK.items():
        for part in ("weight", "bias"):
            yield f"stack.blocks.{ours}.{part}", [f"{PREFIX[kind]}.{i}.{public}.{part}" for i in range(depth)]


def _swap_layout(name: str, array: np.ndarray, patch: int, *, to_public: bool) -> np.ndarray:
    """Linear weights are transposed; the patch embedding is a convolution's kernel (dim, channels, patch, patch)."""
    if name == "patch_embed.proj.weight" and to_public:
        return array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    if name == "patch_embed.proj.weight":
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T if array.ndim == 2 else array


def named_parameters(module: eqx.Module, kind: str, patch: int) -> dict[str, np.ndarray]:
    """A module's arrays, or its gradients, under public names and in public layouts."""
    found = {}
    for path, names in _places(kind, module.stack.depth):
        array = np.asarray(attrgetter(path)(module))
        for name, layer in zip(names, array if "blocks" in path else array[None], strict=True):
            found[name] = _swap_layout(name, layer, patch, to_public=True)
    if kind == "predictor":
        found["mask_token"] = np.asarray(module.mask_token)[None]
    return found


def with_parameters(module: eqx.Module, kind: str, values: dict[str, np.ndarray], patch: int) -> eqx.Module:
    """The module with the file's parameters."""
    for path, names in _places(kind, module.stack.depth):
        layers = [_swap_layout(name, values[name], patch, to_public=False) for name in names]
        array = jnp.asarray(np.stack(layers) if "blocks" in path else layers[0])
        assert array.shape == attrgetter(path)(module).shape
        module = eqx.tree_at(attrgetter(path), module, array)
    if kind == "predictor":
        module = eqx.tree_at(lambda m: m.mask_token, module, jnp.asarray(values["mask_token"][0]))
    return module
