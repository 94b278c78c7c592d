"""Files from strangers: configs, weights, arrays. They run no code, take no memory that they do not have, and are
refused in a few plain words."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import jax.random as jr
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jepax import cli
from jepax.data.decode import read_image
from jepax.data.sources import CorruptExampleError
from jepax.export import weights
from jepax.io import config_yaml as configs
from jepax.io import safe_load
from jepax.nn import ViT, ViTConfig
from jepax.recipes import RECIPES
from jepax.sweeps import SWEEPS
from jepax.training.config import Config
from jepax.types import UserError
from jepax.views import CropConfig

pytestmark = pytest.mark.fault(19, "a file from a stranger runs code")


class Payload:
    """Makes a file named `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """What a payload would make. It must not be there after the test."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def fails(capsys, *argv):
    """The message of a command that must end with code 2 in one to five plain lines."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in argv])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in error
    assert 1 <= len(error.splitlines()) <= 5 and "\x1b" not in error, error
    return error


def refused(call, path):
    with pytest.raises(UserError) as caught:
        call()
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


def write_payload(path, marker, protocol=2):
    """A malicious file of the kind that its name tells."""
    if path.suffix in (".npy", ".npz"):
        array = np.array([Payload(marker)], dtype=object)
        np.save(path, array) if path.suffix == ".npy" else np.savez(path, x=array)
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol))
    return path


def test_the_payload_would_run(tmp_path):
    for name in ("a.pth", "b.npy"):
        data = write_payload(tmp_path / name, tmp_path / f"{name}.ran").read_bytes()
        pickle.loads(data[data.index(b"\x80") :] if name == "a.pth" else data[128:])
        assert (tmp_path / f"{name}.ran").is_dir()


PICKLED = ["w.pth", "w.pth.tar", "pytorch_model.bin", "w.pt", "w.ckpt", "w.pkl", "w.npy", "w.npz"]


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_weights_are_refused_and_not_read(name, tmp_path, marker, capsys):
    (tmp_path / "folder").mkdir()
    file = write_payload(tmp_path / "folder" / name, marker)
    for given in (file, file.parent):
        for error in (fails(capsys, "evaluate", given), refused(lambda given=given: weights.load_encoder(given), file)):
            assert str(file) in error and "safetensors only" in error and "safe_serialization=True" in error


def test_a_pickle_under_the_name_of_weights_is_not_read(tmp_path, marker, capsys):
    folder = whole(tmp_path / "encoder")
    write_payload(folder / weights.MODEL_FILE, marker)
    assert "no complete safetensors file" in fails(capsys, "evaluate", folder)


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("name", ["config.yaml", "w.pth", "w.npy"])
def test_a_pickle_given_as_a_config_is_refused(name, protocol, tmp_path, marker, capsys):
    file = write_payload(tmp_path / name, marker, protocol)
    assert str(file) in fails(capsys, "train", file)


@pytest.mark.parametrize("source", ["image_folder", "fashion_mnist"])
@pytest.mark.parametrize("name", ["w.pth", "w.npy"])
def test_a_pickle_given_as_data_is_refused(name, source, tmp_path, marker, capsys):
    folder = tmp_path / "data"
    for place in ("train/a", "val/a"):
        (folder / place).mkdir(parents=True)
        write_payload(folder / place / name, marker)
    recipe = "ijepa_vitb16_in1k" if source == "image_folder" else "ijepa_fashion_mnist"
    for given in (folder, folder / "train" / "a" / name):
        error = fails(capsys, "train", recipe, "--data.root", given, "--run-dir", tmp_path / "run")
        assert f"data.root={given}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.npy"])
def test_a_pickle_given_as_a_picture_or_an_idx_file_is_refused(name, tmp_path, marker, capsys):
    file = write_payload(tmp_path / name, marker)
    with pytest.raises(CorruptExampleError, match=name):
        read_image(file, (8, 8, 3))
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(file.read_bytes())
    error = fails(capsys, "train", "ijepa_fashion_mnist", "--data.root", tmp_path, "--run-dir", tmp_path / "run")
    assert "is not the published" in error


BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
TAGGED = "!!python/object/apply:os.mkdir ['MARKER']"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (TAGGED, "tags"),
        (f"seed: {TAGGED}", "tags"),
        (f"? {TAGGED}\n: 1", "tags"),
        ("seed: !!python/name:os.system", "tags"),
        ("seed: !!int x", "tags"),
        ("seed: !!timestamp x", "tags"),
        (BOMB, "aliases"),
        ("data: &d {<<: *d}", "anchors"),
        ("seed: *s", "aliases"),
        ("[" * 100_000, "deeper than 32"),
        ("{a: " * 100_000, "deeper than 32"),
        ("- " * 100_000, "deeper than 32"),
        ("seed: [" + "1," * 300_000 + "]", "more than 5000 values"),
        ("recipe: " + "a" * 500_000, "longer than 2000"),
        ("seed: " + "9" * 1900, "seed=999"),
        ("seed: 0x" + "f" * 1900, "seed=672"),
        ("seed: 1" + ":59" * 600, "seed="),
        ("seed: 2001-99-99", "month"),
        ("method: {name: [1]}", "method.name=[1]"),
        ('"\\e[2J\\e[31m": 1', "'\\x1b[2J"),
        ('seed: "\\e[2J"', "'\\x1b[2J'"),
        ("seed: 1\n" + "# \n" * 400_000, "larger than 1 MB"),
    ],
    ids=range(22),
)
def test_yaml_that_is_more_than_plain_values_is_refused(content, word, tmp_path, marker, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(content.replace("MARKER", str(marker)))
    for command in ("train", "sweep"):
        error = fails(capsys, command, path)
        assert str(path) in error and (word in error or command == "sweep") and "\x1b" not in error, error


def test_the_loader_itself_would_run_no_code(tmp_path, marker):
    """Behind the refusal of tags stands a loader that knows none of Python's."""
    assert not set(safe_load._StrictYamlLoader.yaml_constructors) - set(safe_load.yaml.SafeLoader.yaml_constructors)
    assert not any("python" in str(tag) for tag in safe_load._StrictYamlLoader.yaml_multi_constructors)


def test_a_file_without_end_is_not_read_to_its_end(capsys):
    assert "larger than 1 MB" in fails(capsys, "train", "/dev/zero")


def test_our_own_files_hold_no_aliases(tmp_path):
    for config in [function() for function in (*RECIPES.values(), *SWEEPS.values())]:
        configs.save(config, tmp_path / "config.yaml")
        assert configs.load(type(config), tmp_path / "config.yaml") == config
    shared = (0.25, 0.5)
    crop = CropConfig(scale=shared, ratio=shared)
    assert "*" not in configs.to_yaml(crop) and "&" not in configs.to_yaml(crop)
    assert len(configs.to_yaml(Config())) * 20 < safe_load.MAX_YAML_BYTES


def whole(folder):
    """Exported weights of a small encoder."""
    encoder = ViT(ViTConfig(patch_size=4, width=16, depth=2, num_heads=2), key=jr.key(0))
    weights.export(folder, encoder, CropConfig(size=(8, 8)), recipe="mine", step=1, name="target")
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("weights") / "encoder")


@pytest.fixture
def folder(template, tmp_path):
    """A copy of it in the manner of others, whose config.json tells no crop."""
    place = tmp_path / "encoder"
    place.mkdir()
    values = json.loads((template / "config.json").read_text())
    del values["jepax"]
    (place / "config.json").write_text(json.dumps(values))
    (place / weights.MODEL_FILE).write_bytes((template / weights.MODEL_FILE).read_bytes())
    return place


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


HUGE = [
    {"hidden_size": 10**9},
    {"hidden_size": 60_000, "intermediate_size": 60_000},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 65_000},
    {"image_size": 10**7},
    {"image_size": 65_536, "patch_size": 1},
    {"image_size": 65_536},
    {"intermediate_size": 10**400},
    {"intermediate_size": 65_536},
    {"patch_size": 65_536, "image_size": 65_536},
    {"num_attention_heads": 10**9},
    {"num_attention_heads": 7},
    {"hidden_size": 999_999_937, "num_attention_heads": 2},
]


def test_sizes_that_the_tensors_do_not_have_take_no_memory_and_no_time(folder):
    """One process with 6 GB of addresses and 25 s for all of them, of which it may use 0.1 GB."""
    for number, values in enumerate(HUGE):
        place = folder.with_name(f"huge{number}")
        place.mkdir()
        for name in ("config.json", weights.MODEL_FILE):
            (place / name).write_bytes((folder / name).read_bytes())
        change(place, **values)
    script = """
        import resource, sys
        from pathlib import Path
        from jepax.export import weights
        from jepax.types import UserError
        weights.load_encoder(Path(sys.argv[1]) / "encoder")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (25, 25))
        for folder in sorted(Path(sys.argv[1]).glob("huge*")):
            try:
                weights.load_encoder(folder)
            except UserError as error:
                print(str(error).splitlines()[0])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB more than before"
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(HUGE), done.stdout


def test_a_last_layer_alone_makes_no_stack(folder):
    path, last = folder / weights.MODEL_FILE, "encoder.layer.64999.intermediate.dense.weight"
    save_file(load_file(path) | {last: np.zeros((64, 16), np.float32)}, path)
    change(folder, num_hidden_layers=65_000)
    assert "too few for 65000 layers" in refused(lambda: weights.load_encoder(folder), path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"a":' * 200_000, "nested too deep"),
        ("[" * 900_000, "nested too deep"),
        ('{"model_type": ' + "9" * 5000 + "}", "no JSON"),
        ('{"a": "' + "a" * 2_000_000 + '"}', "larger than 1 MB"),
    ],
    ids=range(4),
)
def test_json_that_is_too_deep_or_too_large_is_refused(name, content, word, folder):
    (folder / name).write_text(content)
    assert word in refused(lambda: weights.load_encoder(folder), folder / name)


def lying(data, **tensor):
    """The file with another entry for one of its tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["layernorm.bias"] = header["layernorm.bias"] | tensor
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


LIES = {
    "offsets out of range": lambda data: lying(data, data_offsets=[0, 10**12]),
    "offsets reversed": lambda data: lying(data, data_offsets=[64, 0]),
    "offsets of another tensor": lambda data: lying(data, data_offsets=[0, 64]),
    "offsets below zero": lambda data: lying(data, data_offsets=[-64, 0]),
    "a shape without bytes": lambda data: lying(data, shape=[10**12]),
    "a shape that overflows": lambda data: lying(data, shape=[2**62, 2**62, 16]),
    "a type without bytes": lambda data: lying(data, dtype="F64"),
    "a type that is none": lambda data: lying(data, dtype="O"),
    "a header of 8 EiB": lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:],
    "a header of 16 EiB": lambda data: b"\xff" * 8 + data[8:],
    "a header longer than the file": lambda data: (10**6).to_bytes(8, "little") + data[8:],
    "a header that is too deep": lambda data: (900_000).to_bytes(8, "little") + b'{"a":' * 180_000,
    "a header that is no JSON": lambda data: data[:8] + b"\xff" * (len(data) - 8),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, folder):
    path = folder / weights.MODEL_FILE
    path.write_bytes(LIES[lie](path.read_bytes()))
    assert "no complete safetensors file" in refused(lambda: weights.load_encoder(folder), path)


def test_a_header_that_is_absurdly_large_is_not_parsed(folder):
    path = folder / weights.MODEL_FILE
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little") + b"{")
        file.truncate(90_000_008)  # a file with a hole: it takes no disk
    error = refused(lambda: weights.load_encoder(folder), path)
    assert "90000000 bytes of header" in error


def test_names_of_tensors_are_shown_harmlessly(folder):
    path = folder / weights.MODEL_FILE
    save_file(load_file(path) | {"\x1b[2J" + "a" * 5000: np.zeros(1, np.float32)}, path)
    error = refused(lambda: weights.load_encoder(folder), path)
    assert "\x1b" not in error and len(error) < 600


def test_weights_come_from_their_own_folder_alone(folder):
    """Nothing in the files names other files: no path is ever followed out of the folder."""
    change(folder, _name_or_path="/etc", auto_map={"AutoModel": "evil.Model"}, weights="../../other.safetensors")
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'ran')!r})")
    weights.load_encoder(Path(folder))
    assert not (folder / "ran").exists()
