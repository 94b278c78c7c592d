"""What a folder's config.json and preprocessor_config.json may say."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jepax.export import huggingface
from jepax.nn import ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig, crops

OURS = ViTConfig(
    patch_size=4, in_channels=3, width=32, depth=2, num_heads=2, mlp_ratio=1.5, init_std=None, scan_layers=True
)
CROP = CropConfig(size=(8, 8), interpolation="bicubic", mean=(0.4, 0.5, 0.6), eval_resize_ratio=1.0)
FOREIGN = {
    "model_type": "ijepa",
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": 1e-06,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "mlp_ratio": 4,
    "transformers_version": "4.47.0",
}


def put(folder, name, values):
    (folder / name).write_text(json.dumps(values))


def read(folder, config=None, preprocessor=None):
    put(folder, "config.json", FOREIGN | (config or {}))
    if preprocessor is not None:
        put(folder, "preprocessor_config.json", preprocessor)
    return huggingface.load_hf_config(folder)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 5


def test_our_own_files_are_read_back(tmp_path):
    huggingface.write_hf_config(tmp_path, OURS, CROP, recipe="mine", step=7, name="context")
    assert huggingface.load_hf_config(tmp_path) == (OURS, CROP)
    assert json.loads((tmp_path / "config.json").read_text())["jepax"]["step"] == 7


@pytest.mark.parametrize("change", [{"class_token": True}, {"learned_grid": (2, 2)}, {"norm_epsilon": 1e-12}])
def test_an_encoder_that_the_layout_cannot_describe_is_refused(tmp_path, change):
    with pytest.raises(UserError, match=next(iter(change))):
        huggingface.write_hf_config(tmp_path, replace(OURS, **change), CROP, recipe="mine", step=7, name="context")


def test_files_of_others(tmp_path):
    encoder = replace(OURS, init_std=ViTConfig().init_std, scan_layers=False)
    assert read(tmp_path) == (encoder, CropConfig(size=(8, 8)))
    assert read(tmp_path, {"image_size": [8, 8], "patch_size": [4, 4]})[0] == encoder
    assert read(tmp_path, {"image_size": [8, 16]}) == (encoder, CropConfig(size=(8, 16)))
    with pytest.warns(UserWarning, match=r"0\.5"):
        crop = read(tmp_path, preprocessor={"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})[1]
    assert crop == CropConfig(size=(8, 8), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    gray = read(tmp_path, {"num_channels": 1}, {"image_mean": [0.3], "image_std": [0.2]})
    assert gray[0].in_channels == 1 and gray[1].mean == (0.3,)
    small = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 64}
    assert read(tmp_path, small | {"num_channels": 1})[0].mlp_ratio == 64 / 24


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vit"}, ["model_type=vit", "ijepa"]),
        ({"hidden_act": "gelu_new"}, ["hidden_act=gelu_new", "=gelu "]),
        ({"qkv_bias": False}, ["qkv_bias=False", "True"]),
        ({"qkv_bias": 1}, ["qkv_bias=1", "True"]),
        ({"layer_norm_eps": 1e-12}, ["layer_norm_eps=1e-12", "1e-06"]),
        ({"image_size": [8, 18]}, ["width 18", "multiple of patch_size=4"]),
        ({"image_size": [8, 0]}, ["image_size=[8, 0]", "at least 1"]),
        ({"image_size": [8, 8, 8]}, ["image_size=[8, 8, 8]", "int"]),
        ({"patch_size": [4, 8]}, ["patch_size=[4, 8]", "square"]),
        ({"patch_size": 3}, ["multiple of patch_size=3", "4"]),
        ({"num_channels": 4}, ["in_channels=4"]),
        ({"num_channels": 1}, ["num_channels=1", "preprocessor_config.json", "image_mean"]),
        ({"hidden_size": 30}, ["width=30", "multiple of 4"]),
        ({"num_attention_heads": 5}, ["num_heads=5", "width=32"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "at most 65536"]),
        ({"model_type": "a" * 99 + "\x1b[2J"}, ["model_type='aaa", "..."]),
        ({"hidden_size": "32"}, ["hidden_size='32'", "int"]),
        ({"intermediate_size": None}, ["intermediate_size", "missing"]),
        ({"jepax": {"recipe": "mine", "stepp": 1}}, ["jepax", "stepp", "did you mean step?"]),
        ({"jepax": {"recipe": "mine"}}, ["jepax", "step", "missing"]),
        ({"jepax": 3}, ["jepax", "=3"]),
    ],
)
def test_what_is_not_our_encoder_is_refused(config, words, tmp_path):
    refused(lambda: read(tmp_path, config), str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"do_normalize": False}, ["do_normalize=False", "True"]),
        ({"rescale_factor": 1.0}, ["rescale_factor=1.0", "0.0039"]),
        ({"resample": 0}, ["resample=0", "bilinear"]),
        ({"image_mean": 0.5}, ["image_mean=0.5", "float"]),
        ({"image_std": [0, 1, 1]}, ["std=(0.0, 1.0, 1.0)", "positive"]),
        ([1], ["list"]),
    ],
)
def test_pixels_that_are_prepared_otherwise_are_refused(values, words, tmp_path):
    refused(lambda: read(tmp_path, preprocessor=values), str(tmp_path / "preprocessor_config.json"), *words)


def test_files_that_are_no_json_are_refused(tmp_path):
    refused(lambda: huggingface.load_hf_config(tmp_path / "nowhere"), "nowhere/config.json", "No such file")
    for content, word in ((b"", "no JSON"), (b"{", "no JSON"), (b"\xff\xfe\x00", "not text")):
        (tmp_path / "config.json").write_bytes(content)
        refused(lambda: huggingface.load_hf_config(tmp_path), str(tmp_path / "config.json"), word)


def test_sizes_of_our_own_that_contradict_each_other_are_refused(tmp_path):
    huggingface.write_hf_config(tmp_path, OURS, CROP, recipe="mine", step=7, name="context")
    values = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path, "config.json", values | {"image_size": 12})
    refused(lambda: huggingface.load_hf_config(tmp_path), "image_size=12", "(8, 8)")
    put(tmp_path, "config.json", values | {"jepax": values["jepax"] | {"crop": {"size": [8, 0]}}})
    refused(lambda: huggingface.load_hf_config(tmp_path), str(tmp_path / "config.json"), "crop.size=(8, 0)")


def written(folder, crop):
    """The values of both files."""
    huggingface.write_hf_config(folder, OURS, crop, recipe="mine", step=7, name="context")
    return [json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")]


def test_a_view_that_is_not_square_is_written_and_its_preprocessor_only_normalizes(tmp_path):
    crop = replace(CROP, size=(8, 12))
    config, preprocessor = written(tmp_path, crop)
    assert config["image_size"] == [8, 12] and huggingface.load_hf_config(tmp_path) == (OURS, crop)
    assert not preprocessor["do_resize"] and not preprocessor["do_center_crop"] and preprocessor["do_normalize"]
    put(tmp_path, "config.json", config | {"image_size": [12, 8]})
    refused(lambda: huggingface.load_hf_config(tmp_path), "image_size=[12, 8]", "(8, 12)")


def transformers_box(preprocessor, height, width):
    """Box (top, left, height, width) of transformers' crop, in pixels of the image: transformers/image_transforms.py,
    get_resize_output_image_size and center_crop."""
    short = preprocessor["size"]["shortest_edge"]
    resized = [int(short * side / min(height, width)) for side in (height, width)]
    crop = preprocessor["crop_size"]["height"], preprocessor["crop_size"]["width"]
    start = [(side - cut) // 2 for side, cut in zip(resized, crop, strict=True)]
    scale = np.array([height, width]) / resized
    return np.concatenate([start * scale, crop * scale])


@pytest.mark.parametrize(("side", "ratio"), [(224, 256 / 224), (160, 256 / 224), (96, 1.1), (28, 1.0), (7, 2.5)])
def test_transformers_crops_the_runs_own_box_of_every_shape(side, ratio, tmp_path):
    """The photo of 1280 x 720 is one of those whose margin is odd: 16:9 at 224 pixels."""
    crop = replace(CROP, size=(side, side), eval_resize_ratio=ratio)
    preprocessor = written(tmp_path, crop)[1]
    shapes = np.random.default_rng(0).integers(1, 2000, (3000, 2))
    shapes = np.concatenate([shapes, [(720, 1280), (1280, 720), (375, 500), (side, side)]]).astype(np.int32)
    theirs = np.array([transformers_box(preprocessor, *map(int, shape)) for shape in shapes])
    np.testing.assert_allclose(crops._center_boxes(jnp.asarray(shapes), crop), theirs, rtol=1e-5, atol=1e-6)
