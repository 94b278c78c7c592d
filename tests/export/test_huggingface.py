"""What a folder's config.json and preprocessor_config.json may say."""

import json
from dataclasses import replace

import pytest

from jepax.export import huggingface
from jepax.nn import ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig

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


def test_files_of_others(tmp_path):
    encoder = replace(OURS, init_std=ViTConfig().init_std, scan_layers=False)
    assert read(tmp_path) == (encoder, CropConfig(size=(8, 8)))
    assert read(tmp_path, {"image_size": [8, 8], "patch_size": [4, 4]})[0] == encoder
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
        ({"image_size": [8, 16]}, ["image_size=[8, 16]", "square"]),
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


def test_a_view_that_is_not_square_is_refused(tmp_path):
    crop = replace(CROP, size=(8, 12))
    refused(lambda: huggingface.write_hf_config(tmp_path, OURS, crop, recipe="", step=0, name=""), "(8, 12)", "square")
