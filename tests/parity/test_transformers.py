"""Folders of weights against transformers' own I-JEPA, and against the public I-JEPA's recorded numbers."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import save_file

from jepax.export.weights import export, load_encoder
from jepax.nn import ViT, ViTConfig
from jepax.types import ImageBatch
from jepax.views import CropConfig, center_crop
from tests.parity.reference import GOLDEN, group, views_of

FILE = GOLDEN / "ijepa_reference_trajectory.npz"
PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def theirs(name, value):
    """One public tensor under transformers' names, as models/ijepa/convert_ijepa_to_hf.py renames them."""
    if name.startswith("patch_embed.proj"):
        return {name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection"): value}
    if not name.startswith("blocks."):
        return {f"layer{name}": value}
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    if module == "attn.qkv":
        thirds = zip(("query", "key", "value"), np.split(value, 3), strict=True)
        return {f"encoder.layer.{layer}.attention.attention.{part}.{kind}": third.copy() for part, third in thirds}
    return {f"encoder.layer.{layer}.{PARTS[module]}.{kind}": value}


@pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is not in the folder of recorded numbers")
def test_the_recorded_encoder_as_a_folder_gives_the_recorded_tokens(tmp_path):
    with np.load(FILE) as file:
        golden = dict(file)
    tensors = {"embeddings.position_embeddings": golden["init.target_encoder.pos_embed"]}
    for name, value in group(golden, "init.target_encoder.").items():
        tensors |= theirs(name, value)
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {
        "image_size": "crop_size",
        "patch_size": "patch_size",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }
    config = {key: int(golden[f"config.{name}"]) for key, name in sizes.items()}
    config |= {"num_channels": 3, "intermediate_size": len(tensors["encoder.layer.0.intermediate.dense.bias"])}
    config |= {"model_type": "ijepa", "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = load_encoder(tmp_path)[0](views_of(golden, 0).image)
    np.testing.assert_allclose(tokens, golden["step0.target_encoder_output"], rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=[(3, (28, 28)), (1, (28, 28)), (3, (28, 40))])
def folder(request, tmp_path_factory):
    """An exported encoder with no parameter at a value that would hide a wrong place."""
    channels, size = request.param
    config = ViTConfig(patch_size=4, in_channels=channels, width=48, depth=3, num_heads=4, init_std=None)
    leaves, tree = jax.tree.flatten(eqx.filter_jit(ViT)(config, key=jr.key(0)))
    noisy = [leaf + 0.1 * jr.normal(jr.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    crop = CropConfig(size=size, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.25)[:channels])
    path = tmp_path_factory.mktemp("weights") / "encoder"
    export(path, jax.tree.unflatten(tree, noisy), crop, recipe="mine", step=1, name="target")
    return path


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_tokens_and_writes_what_we_read(folder, tmp_path, transformers, record_property):
    import torch

    encoder, crop = load_encoder(folder)
    model, loading = transformers.IJepaModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    view = np.random.default_rng(0).normal(size=(2, *crop.size, encoder.config.in_channels)).astype(np.float32)
    with torch.no_grad():
        tokens = model(torch.from_numpy(view.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    difference = float(np.max(np.abs(encoder(jnp.asarray(view)) - tokens)))
    record_property("largest_difference", difference)
    assert difference <= 1e-4

    model.save_pretrained(tmp_path)
    again, its_crop = load_encoder(tmp_path)
    assert its_crop == crop and again.config == encoder.config
    for a, b in zip(*map(jax.tree.leaves, (encoder, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 59), (36, 40), (40, 36), (28, 40)])
def test_transformers_prepares_the_same_pixels(folder, transformers, shape):
    """To one level of 256: transformers rounds the resized image to integers.

    An image of a view that is not square must have the view's size already; others are left as they are.
    """
    crop = load_encoder(folder)[1]
    is_square = crop.size[0] == crop.size[1]
    image = np.random.default_rng(0).integers(0, 256, (*shape, len(crop.mean))).astype(np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(image, return_tensors="np")["pixel_values"]
    if not is_square:
        crop = dataclasses.replace(crop, size=shape, eval_resize_ratio=1.0)
    canvas = np.pad(image, ((0, 70 - shape[0]), (0, 70 - shape[1]), (0, 0)))[None]
    ours = center_crop(ImageBatch(canvas, np.array([shape], np.int32), np.zeros(1, np.int32)), crop)
    levels = (pixels.transpose(0, 2, 3, 1) - np.asarray(ours)) * np.array(crop.std) * 255
    assert np.max(np.abs(levels)) <= 1.01
