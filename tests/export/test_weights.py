"""Encoders as folders of safetensors: what is written is read back bit by bit, and nothing else is read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jepax import cli
from jepax.export import weights
from jepax.nn import ViT, ViTConfig
from jepax.training import evaluation
from jepax.training import loop as training
from jepax.training.config import Config
from jepax.types import UserError
from jepax.views import CropConfig
from tests.contracts.shrink import shrunk

CONFIG = ViTConfig(patch_size=4, in_channels=3, width=32, depth=2, num_heads=2, mlp_ratio=1.5)
CROP = CropConfig(size=(12, 12))


def encoder_of(config=CONFIG):
    """Every parameter random: no two equal, no bias zero."""
    encoder = eqx.filter_jit(ViT)(config, key=jr.key(0))
    leaves, tree = jax.tree.flatten(encoder)
    keys = jr.split(jr.key(1), len(leaves))
    return jax.tree.unflatten(tree, [jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def exported(folder, encoder, crop=CROP):
    weights.export(folder, encoder, crop, recipe="mine", step=7, name="target")
    return folder


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def folder(tmp_path):
    return exported(tmp_path / "encoder", encoder_of())


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        weights.load_encoder(folder)
    assert all(word in str(caught.value) for word in [str(folder / weights.MODEL_FILE), *words]), caught.value
    assert len(str(caught.value).splitlines()) <= 5


def change(folder, values):
    """Other tensors in the file; None removes one."""
    tensors = {name: x for name, x in (load_file(folder / weights.MODEL_FILE) | values).items() if x is not None}
    save_file(tensors, folder / weights.MODEL_FILE)


@pytest.mark.parametrize(
    "changes", [{}, {"in_channels": 1, "scan_layers": True, "remat": "dots", "mlp_ratio": 48 / 11}]
)
def test_what_is_written_is_read_back_bit_by_bit(tmp_path, changes):
    encoder = encoder_of(replace(CONFIG, **({"width": 44} if "mlp_ratio" in changes else {}) | changes))
    crop = replace(CROP, mean=CROP.mean[: encoder.config.in_channels], std=CROP.std[: encoder.config.in_channels])
    read, its_crop = weights.load_encoder(exported(tmp_path / "encoder", encoder, crop))
    assert_equal(read, encoder)
    assert (read.config, its_crop) == (encoder.config, crop)


def test_an_encoder_of_views_that_are_not_square_is_read_back(tmp_path):
    encoder, crop = encoder_of(), replace(CROP, size=(8, 12))
    folder = exported(tmp_path / "encoder", encoder, crop)
    assert load_file(folder / weights.MODEL_FILE)["embeddings.position_embeddings"].shape == (1, 2 * 3, 32)
    read, its_crop = weights.load_encoder(folder)
    assert_equal(read, encoder)
    assert its_crop == crop


def test_the_command_names_the_size_of_views_that_are_not_square(tmp_path, capsys, monkeypatch):
    crop = replace(CROP, size=(8, 12))
    method = replace(Config().method, crop=crop, encoder=encoder_of().config)
    config = Config(recipe="mine", method=method)
    state = SimpleNamespace(step=3, method=SimpleNamespace(encoders=lambda: {"target": encoder_of()}))
    monkeypatch.setattr(evaluation, "load_run_config", lambda run: config)
    monkeypatch.setattr(evaluation, "load_state", lambda config, run, step: state)
    cli.main(["export", "run", str(tmp_path / "encoder")])
    assert capsys.readouterr().out.splitlines()[1].endswith("resize and crop images to 8 x 12 yourself")


def test_the_tensors_are_named_and_laid_out_as_theirs(folder):
    """Written out for one encoder; `tests/parity/test_transformers.py` holds them against transformers itself."""
    encoder, tensors = encoder_of(), load_file(folder / weights.MODEL_FILE)
    assert len(tensors) == 5 + 2 * 16
    block = encoder.stack.blocks
    for place, name in enumerate(("query", "key", "value")):
        columns = slice(32 * place, 32 * (place + 1))
        for kind, array in (
            ("weight", block.attention.qkv.weight[1, :, columns].T),
            ("bias", block.attention.qkv.bias),
        ):
            theirs = tensors[f"encoder.layer.1.attention.attention.{name}.{kind}"]
            np.testing.assert_array_equal(theirs, array if kind == "weight" else array[1, columns])
    kernel = tensors["embeddings.patch_embeddings.projection.weight"]
    assert kernel.shape == (32, 3, 4, 4)
    for row, column, channel in ((0, 0, 1), (0, 1, 0), (2, 3, 1)):
        np.testing.assert_array_equal(
            kernel[:, channel, row, column], encoder.embed.weight[(row * 4 + column) * 3 + channel]
        )
    np.testing.assert_array_equal(tensors["encoder.layer.0.output.dense.weight"], block.mlp.fc2.weight[0].T)
    assert tensors["embeddings.position_embeddings"].shape == (1, 9, 32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_float_types_are_read_as_float32(folder, dtype):
    change(folder, {name: value.astype(dtype) for name, value in load_file(folder / weights.MODEL_FILE).items()})
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), encoder_of())
    assert_equal(weights.load_encoder(folder)[0], rounded)


def test_a_folder_of_somebody_else_is_read(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "jepax"}))
    (folder / "preprocessor_config.json").unlink()
    read, crop = weights.load_encoder(folder)
    assert_equal(jax.tree.leaves(read), jax.tree.leaves(encoder_of()))
    assert crop == CROP


POSITIONS, BIAS = weights.POS_EMBED_NAME, "encoder.layer.1.intermediate.dense.bias"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({BIAS: None}, [BIAS, "absent", "[48]"]),
        ({"classifier.weight": np.zeros((2, 2), np.float32)}, ["classifier.weight", "[2, 2]", "absent", "IJepaModel"]),
        ({BIAS: np.zeros(49, np.float32)}, [BIAS, "[49]", "[48]", "config.json"]),
        ({BIAS: np.zeros(48, np.int32)}, [BIAS, "I32", "float32"]),
        ({BIAS: np.full(48, np.nan, np.float32)}, [BIAS, "not finite"]),
        ({POSITIONS: None}, [POSITIONS, "absent"]),
        ({POSITIONS: np.zeros((1, 10, 32), np.float32)}, [POSITIONS, "[1, 10, 32]", "[1, 9, 32]"]),
        ({POSITIONS: np.zeros((1, 9, 32), np.float32)}, [POSITIONS, "differ by 1 ", "sine-cosine"]),
        ({POSITIONS: np.zeros((1, 9, 32), np.float16)}, [POSITIONS, "differ by 1 ", "sine-cosine"]),
    ],
)
def test_tensors_of_another_model_are_refused(folder, values, words):
    change(folder, values)
    refused(folder, *words)


def test_positions_may_differ_by_rounding_alone(folder):
    table = load_file(folder / weights.MODEL_FILE)[POSITIONS]
    change(folder, {POSITIONS: table + np.float32(0.9e-4)})
    weights.load_encoder(folder)
    change(folder, {POSITIONS: table + np.float32(1.1e-4)})
    refused(folder, POSITIONS, "0.00011")


def test_a_file_that_is_not_whole_is_refused(folder):
    path = folder / weights.MODEL_FILE
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:40], whole[:-1], whole + b"0", b"\x80\x04" * 100):
        path.write_bytes(content)
        refused(folder, "no complete safetensors file")
    path.unlink()
    refused(folder, "missing")
    path.mkdir()
    refused(folder, "no complete safetensors file")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    encoder, folder = encoder_of(), tmp_path / "deep" / "encoder"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            exported(folder, encoder)
    assert not list(folder.parent.iterdir())
    (folder.parent / "encoder.part").mkdir()  # as an interrupted export leaves it
    exported(folder, encoder)
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    before = (folder / weights.MODEL_FILE).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        exported(folder, encoder)
    assert (folder / weights.MODEL_FILE).read_bytes() == before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = shrunk("ijepa_fashion_mnist")
    return config, folder, training.train(config, folder)


def test_the_command_writes_the_teacher_of_the_newest_step(run, tmp_path, capsys):
    config, folder, state = run
    cli.main(["export", str(folder), str(tmp_path / "encoder")])
    assert capsys.readouterr().out == f"{tmp_path / 'encoder'}: the target encoder after step 6\n"
    read, crop = weights.load_encoder(tmp_path / "encoder")
    assert_equal(read, state.method.target_encoder.average)
    assert crop == config.method.crop


def test_the_command_takes_a_step_and_an_encoder(run, tmp_path):
    config, folder, state = run
    for step in (4, 6):
        cli.main(["export", str(folder), str(tmp_path / str(step)), "--step", str(step), "--encoder=context"])
    assert_equal(weights.load_encoder(tmp_path / "6")[0], state.method.encoder)
    then = weights.load_encoder(tmp_path / "4")[0]
    assert_equal(then, evaluation.load_state(config, folder, 4).method.encoder)
    assert not np.array_equal(then.embed.weight, state.method.encoder.embed.weight)
    assert json.loads((tmp_path / "4" / "config.json").read_text())["jepax"]["step"] == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("RUN", ["jepax export runs/NAME FOLDER"]),
        ("nowhere OUT", ["nowhere", "config.yaml"]),
        ("RUN OUT --step 5", ["step 5", "4, 6"]),
        ("RUN OUT --step newest", ["--step: newest", "int"]),
        ("RUN OUT --step", ["--step: a value is missing"]),
        ("RUN OUT --encoder teacher", ["--encoder teacher", "target, context"]),
        ("RUN OUT --stp 4", ["--stp", "did you mean --step?"]),
        ("RUN OUT more", ["more"]),
        ("RUN RUN", ["exists already"]),
    ],
)
def test_the_commands_errors_are_a_few_lines(run, argv, words, tmp_path, capsys):
    names = {"RUN": str(run[1]), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *(names.get(word, word) for word in argv.split())])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and len(error.splitlines()) <= 5
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
