"""Reads the recorded numbers of LeWorldModel into our modules, and our gradients back under the recorded names."""

from collections.abc import Iterator
from operator import attrgetter

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.reference import GOLDEN

HEAD = {"fc1": "fc1", "bn": "norm", "fc2": "fc2"}
ACTION = {"smooth": "embed", "fc1": "fc1", "fc2": "fc2"}
MAPS = {"input": "input", "condition": "condition", "norm": "norm", "output": "output"}
BLOCK = {
    "modulation": "modulation",
    "attn.norm": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.out": "attention.proj",
    "mlp.norm": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VIT_BLOCK = {"norm1": "norm1", "out": "attention.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
KINDS = {"scale": "weight", "weight": "weight", "bias": "bias"}
"""A norm's weight is called scale there."""


def recorded(name):
    """The file's arrays; float32 weights and inputs."""
    path = GOLDEN / "worldmodel" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no worldmodel/{path.name} in the folder of recorded numbers")
    with np.load(path) as file:
        return dict(file)


def under(golden, prefix):
    """The file's entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def sizes(golden):
    return {name: value.item() for name, value in under(golden, "config.").items()}


def places(module: eqx.Module, kind: str) -> Iterator[tuple[str, object]]:
    """Each recorded name, and what gets our array of it from the module. Linear weights are transposed there."""
    if kind == "predictor":
        yield "pos", lambda m: m.positions
        yield from _layers(MAPS, module)
        for i, block in enumerate(module.blocks):
            for name, get in _layers(BLOCK, block):
                yield f"layers.{i}.{name}", lambda m, i=i, get=get: get(m.blocks[i])
    else:
        yield from _layers({"head": HEAD, "action": ACTION, "block": BLOCK}[kind], module)


def _layers(table, module):
    for theirs, ours in table.items():
        layer = attrgetter(ours)(module)
        if layer is None:
            continue
        is_norm = layer.weight.ndim == 1
        yield f"{theirs}.{'scale' if is_norm else 'weight'}", attrgetter(f"{ours}.weight")
        if layer.bias is not None:
            yield f"{theirs}.bias", attrgetter(f"{ours}.bias")


def with_weights(module, kind, weights, dtype):
    """The module with recorded weights, each of which has a place except running statistics."""
    found = dict(places(module, kind))
    assert set(found) == {name for name in weights if "running" not in name}
    for name, get in found.items():
        array = weights[name].T if weights[name].ndim == 2 and name != "pos" else weights[name]
        assert array.shape == get(module).shape, name
        module = eqx.tree_at(get, module, jnp.asarray(array, dtype))
    return module


def named(module, kind):
    """The module's arrays, or gradients, under the recorded names and in their layouts."""
    arrays = {name: np.asarray(get(module)) for name, get in places(module, kind)}
    return {name: x.T if x.ndim == 2 and name != "pos" else x for name, x in arrays.items()}


def with_vit_weights(vit, weights, dtype):
    """The encoder with recorded weights; its class token's position is the first there and the last here."""
    patch = weights["patch.weight"].transpose(2, 3, 1, 0).reshape(-1, vit.config.width)
    new = {"embed.weight": patch, "embed.bias": weights["patch.bias"], "class_token": weights["cls"][None]}
    new |= {"norm.weight": weights["norm.scale"], "norm.bias": weights["norm.bias"]}
    new["positions"] = np.roll(weights["pos"], -1, axis=0)
    layers = [under(weights, f"blocks.{i}.") for i in range(vit.config.depth)]
    for kind in ("weight", "bias"):
        for theirs, ours in VIT_BLOCK.items():
            name = f"{theirs}.{'scale' if 'norm' in theirs and kind == 'weight' else kind}"
            new[f"stack.blocks.{ours}.{kind}"] = np.stack([layer[name].T for layer in layers])
        joint = [np.concatenate([layer[f"{part}.{kind}"].T for part in "qkv"], axis=-1) for layer in layers]
        new[f"stack.blocks.attention.qkv.{kind}"] = np.stack(joint)
    for path, array in new.items():
        assert array.shape == attrgetter(path)(vit).shape, path
        vit = eqx.tree_at(attrgetter(path), vit, jnp.asarray(array, dtype))
    return vit


def named_vit(vit):
    """The encoder's arrays, or gradients, under the recorded names and in their layouts."""
    patch, width = vit.config.patch_size, vit.config.width
    kernel = np.asarray(vit.embed.weight).reshape(patch, patch, -1, width).transpose(3, 2, 0, 1)
    found = {"patch.weight": kernel, "patch.bias": np.asarray(vit.embed.bias), "cls": np.asarray(vit.class_token[0])}
    found |= {"norm.scale": np.asarray(vit.norm.weight), "norm.bias": np.asarray(vit.norm.bias)}
    found["pos"] = np.roll(np.asarray(vit.positions), 1, axis=0)
    for kind in ("weight", "bias"):
        for theirs, ours in VIT_BLOCK.items():
            name = f"{theirs}.{'scale' if 'norm' in theirs and kind == 'weight' else kind}"
            for i, layer in enumerate(np.asarray(attrgetter(f"{ours}.{kind}")(vit.stack.blocks))):
                found[f"blocks.{i}.{name}"] = layer.T
        for i, joint in enumerate(np.asarray(getattr(vit.stack.blocks.attention.qkv, kind))):
            thirds = zip("qkv", np.split(joint, 3, axis=-1), strict=True)
            found |= {f"blocks.{i}.{part}.{kind}": third.T for part, third in thirds}
    return found


def assert_outputs(ours, theirs, name, tolerance=None):
    """1e-10 in float64, 2e-5 in float32, absolute, or the tolerance given."""
    tolerance = tolerance or (1e-10 if theirs.dtype == np.float64 else 2e-5)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def assert_gradients(ours, theirs):
    """1e-9 of the largest entry in float64; 1e-4 of the norm in float32. Gradients that are zero: 1e-6, absolute."""
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        error, size = ours[name] - wanted, np.abs(wanted).max()
        is_wide = wanted.dtype == np.float64
        assert ours[name].dtype == wanted.dtype, name
        if size < (1e-12 if is_wide else 1e-6):
            assert np.abs(error).max() <= (1e-10 if is_wide else 1e-6), name
        elif is_wide:
            assert np.abs(error).max() <= 1e-9 * size, f"{name}: {np.abs(error).max() / size:.1e}"
        else:
            assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(wanted), f"{name}: {np.linalg.norm(error):.1e}"
