"""The command line from outside: what it prints, where, and its exit code."""

import io
import json
import logging
import os
import re
import subprocess
import sys

import jax
import pytest
from rich.console import Console
from rich.table import Table

from jepax import cli
from jepax.commands import COMMANDS, train
from jepax.commands.recipes import Recipes
from jepax.commands.train import Train
from jepax.data import DataConfig
from jepax.errors import CUDA_INSTALL
from jepax.io import config_yaml as configs
from jepax.io import events
from jepax.training.config import Config

TINY = """
    --data.dataset synthetic --data.canvas-size 28 --data.channels 1 --data.synthetic-size 80 --data.val-fraction 0.2
    --method.encoder.width 24 --method.encoder.depth 1 --method.predictor.width 12 --method.predictor.depth 1
    --train.batch-size 16 --train.steps 3 --optim.warmup-epochs 0.2 --eval.batch-size 40 --eval.linear.epochs 2
    --eval.linear.learning-rates 1e-2 --eval.linear.weight_decays 0.0
""".split()


def fails(capsys, *argv, code=2):
    """The message of a command that must end in one to five plain lines."""
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    out, error = capsys.readouterr()
    assert caught.value.code == code
    assert 1 <= len(error.splitlines()) <= 5 and "Traceback" not in error and "╭" not in error, error
    assert out == ""
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", ["'trian'", "did you mean train?"]),
        ("recipes 3", ["jepax recipes", "'3'"]),
        ("train", ["RECIPE", "ijepa_fashion_mnist"]),
        ("train --seed 1", ["RECIPE"]),
        ("train ijepa_fashion_mnis", ["'ijepa_fashion_mnis'", "did you mean ijepa_fashion_mnist?"]),
        ("train nowhere/config.yaml", ["nowhere/config.yaml", "No such file"]),
        ("train ijepa_fashion_mnist 3", ["'3'", "--OPTION VALUE"]),
        ("train ijepa_fashion_mnist --run-dir", ["--run-dir", "a value is missing"]),
        ("train ijepa_fashion_mnist --run-dir a --run_dir b", ["duplicate option --run-dir"]),
        ("train ijepa_fashion_mnist --dry-run --distributed", ["--dry-run", "leave --distributed out"]),
        (
            "train ijepa_fashion_mnist --allow-config-change peek_lr",
            ["--allow-config-change peek_lr", "--optim.peak-lr"],
        ),
        ("train ijepa_fashion_mnist --optim.nesterov True", ["--optim.nesterov", "optim has", "peak_lr", "beta1"]),
        ("train ijepa_fashion_mnist --num-classes 10", ["--num-classes", "the data has"]),
        ("grid family_fashion_mnist", ["'grid'", "sweep"]),
        ("data pack a b", ["'data'", "pack"]),
        ("doctor a --step 1", ["--step", "jepax doctor takes no options"]),
        ("train ijepa_fashion_mnist --optim.peek_lr 1", ["--optim.peek_lr", "did you mean --optim.peak-lr?"]),
        ("train ijepa_fashion_mnist --patch-size 4", ["--patch-size", "--method.encoder.patch-size"]),
        ("train ijepa_fashion_mnist --rundir x", ["--rundir", "--run-dir"]),
        ("train ijepa_fashion_mnist --xyzzy 4", ["--xyzzy", "--help"]),
        ("train ijepa_fashion_mnist --seed 1 --optim.peak-lr fast", ["--optim.peak-lr", "fast", "float"]),
        ("train ijepa_fashion_mnist --optim.peak-lr nan", ["optim.peak_lr=nan", "above 0"]),
        ("train ijepa_fashion_mnist --train.epochs inf", ["train.epochs", "inf", "float"]),
        ("train ijepa_fashion_mnist --train.batch-size 1.5", ["--train.batch-size", "1.5", "int"]),
        ("train ijepa_fashion_mnist --method.crop.size 28", ["--method.crop.size", "28", "2 values"]),
        ("train ijepa_fashion_mnist --method.loss l3", ["--method.loss", "l3", "smooth_l1, l2"]),
        (
            "train ijepa_fashion_mnist --method.encoder.scan-layers",
            ["--method.encoder.scan-layers", "a value is missing", "True or False"],
        ),
        ("train ijepa_fashion_mnist --train.batch-size=-8", ["train.batch_size=-8", "above 0"]),
        ("train ijepa_fashion_mnist --method.encoder.num-heads 5", ["num_heads=5", "width=192", "num_heads=4"]),
        ("train ijepa_fashion_mnist --train.batch-size 12", ["train.batch_size=12", "8"]),
        ("train ijepa_fashion_mnist --data.root /nowhere", ["data.root=/nowhere"]),
        ("train ijepa_vitb16_in1k", ["data.root=None", "image_folder"]),
        ("train ijepa_vitb16_in1k --data.root /nowhere", ["data.root=/nowhere", "train/"]),
        ("evaluate --step 3", ["runs/NAME"]),
        ("bench", ["jepax bench takes RECIPE", "ijepa_fashion_mnist"]),
        ("bench-data ijepa_fashion_mnist --baseline torch", ["--baseline"]),
        ("evaluate nowhere", ["nowhere", "config.yaml"]),
    ],
)
def test_an_error_of_the_user_is_a_few_lines(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, *argv.split())
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--method.masks.num-context-patches 16", ["masks.num_context_patches=16", "4x4 grid", "try"]),
        ("--method.encoder.patch-size 5", ["28", "patch_size=5", "4 or 7"]),
        ("--data.channels 3", ["method.encoder.in_channels", "1 channels", "data.channels=1"]),
        ("--optim.warmup-epochs 100", ["optim.warmup_epochs=100.0", "3"]),
        ("--method.encoder.num-heads 5", ["--method.encoder.num-heads: num_heads=5", "width"]),
        ("--seed -1", ["seed=-1"]),
        ("--seed 4294967296", ["seed=4294967296", "2^32 - 1"]),
        ("--eval.linear.epochs 0 --seed 3", ["--eval.linear.epochs: linear.epochs=0", "at least 1"]),
        ("--data.val-fraction 0", ["data.val_fraction=0.0", "validation split"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(argv, words, capsys, tmp_path):
    error = fails(capsys, "train", "ijepa_fashion_mnist", *TINY, *argv.split(), "--run-dir", str(tmp_path / "run"))
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_help_version_and_recipes(capsys):
    for argv in ([], ["--help"]):
        cli.main(argv)
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in COMMANDS) and "jepax train RECIPE --help" in out
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jepax 0.")
    cli.main(["recipes"])
    assert "ijepa_fashion_mnist " in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_lists_its_options_with_types_defaults_and_meanings(name, capsys):
    cli.main([name, "--help"])
    out, kind = capsys.readouterr().out, COMMANDS[name]
    assert out.startswith(f"usage: jepax {name} ")
    words = " ".join(out.replace("│", " ").split())
    assert kind.__doc__.splitlines()[0] in words and f"For example: jepax {name}" in words
    for option in kind.options():
        assert f" --{option.replace('_', '-')}" in words, option
    assert "PATH" not in out and "STR" not in out  # each has a name of its own in place of its type
    assert "--overrides" not in out


def test_help_does_not_wait_for_jax():
    commands = [[], *([name, "--help"] for name in COMMANDS)]
    script = (
        f"import sys; from jepax.cli import main; [main(argv) for argv in {commands}]; assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_switch_takes_no_value(monkeypatch):
    read = Train.read("train", ["--dry-run", "ijepa_fashion_mnist", "--seed", "3"])
    assert read.dry_run and read.recipe == "ijepa_fashion_mnist" and read.config().seed == 3


def test_a_recipes_help_shows_every_field_with_type_default_and_meaning(capsys):
    cli.main(["train", "ijepa_fashion_mnist", "--help"])
    out = capsys.readouterr().out
    for path in configs.flatten(Config()):
        if path != "method.name":
            assert f"--{path.replace('_', '-')} " in out, path
    assert "--run-dir" in out and "Dimension of a token" in out and "default: 192" in out


def test_interruption_takes_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # it is replaced

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipes, "run", interrupted)
    assert "rerun the same command to resume" in fails(capsys, "recipes", code=75)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding, monkeypatch):
    def run(self):
        print("caf\udce9.jpg")
        Console(width=60).print(Table("top-1", "74.2 \xb1 0.3"))

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(Recipes, "run", run)
    cli.main(["recipes"])
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)
    assert r"caf\udce9.jpg" in shown and ("74.2 \xb1 0.3" if encoding == "utf-8" else r"74.2 \xb1 0.3") in shown


def test_doctor_names_a_file_whose_name_is_not_utf8(tmp_path, monkeypatch):
    data = DataConfig(dataset="synthetic", canvas_size=8, synthetic_size=80)
    configs.save(Config(data=data), tmp_path / "config.yaml")
    events.append_jsonl(tmp_path / "corrupt.jsonl", {"file": "train/caf\udce9.jpg", "why": "it is empty"})
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    cli.main(["doctor", str(tmp_path)])
    out.flush()
    assert rb"1 corrupt, such as train/caf\udce9.jpg" in out.buffer.getvalue()


def test_a_setting_known_to_collapse_is_warned_of_once(capsys):
    flowing = ["--method.stop-gradient", "False", "--method.regularizer.name", "none"]
    fails_with = ["train", "ijepa_fashion_mnist_no_teacher", *flowing, "--data.root", "/nowhere"]
    with pytest.raises(SystemExit):
        cli.main(fails_with)
    lines = capsys.readouterr().err.splitlines()
    assert sum("stop_gradient=False" in line and line.startswith("jepax: warning") for line in lines) == 1


def test_a_run_trains_evaluates_continues_and_is_trained_again(capsys, tmp_path, monkeypatch):
    run, again = tmp_path / "My [2024] project" / "exp[lr=1e-3]", tmp_path / "again"
    cli.main(["train", "ijepa_fashion_mnist", *TINY, "--eval.protocols", "knn", "--run-dir", str(run)])
    out, error = capsys.readouterr()
    read = ["train: 64 images of 8 classes", "validation: 16 images of 8 classes", "test: 16 images of 8 classes"]
    assert [line for line in error.splitlines() if "images of" in line] == read
    for word in ("trained encoder", "raw pixels", "evals/step_00000003.json", "figures/curves.png"):
        assert word in out, out
    assert re.search(r"\ndone in [\d.]+ min; health: no alarm\n$", out)
    config = configs.load(Config, run / "config.yaml")
    assert (config.train.steps, config.method.encoder.width, config.optim.warmup_epochs) == (3, 24, 0.2)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 2]

    cli.main(["train", "ijepa_fashion_mnist", *TINY, "--run-dir", str(again), "--dry-run"])
    told = capsys.readouterr().out
    assert "one step of 16 examples ..." in told and f"loss {metrics[0]['train/loss']:.4f}" in told
    assert not again.exists()

    error = fails(capsys, "train", "ijepa_fashion_mnist", *TINY, "--seed", "1", "--run-dir", str(run))
    assert "seed: 0 -> 1" in error and "--run-dir" in error

    finished = []
    monkeypatch.setattr(train, "finalize", lambda *given: finished.append(given))  # its work is seen above
    cli.main(["train", "ijepa_fashion_mnist", *TINY, "--eval.protocols", "knn", "--run-dir", str(run)])
    assert [(given[0], int(given[1].step), given[2]) for given in finished] == [(config, 3, run)]
    assert "first step" not in capsys.readouterr().err  # it was done already

    cli.main(["train", str(run / "config.yaml"), "--run-dir", str(again)])
    repeated = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in repeated] == [line["train/loss"] for line in metrics]


def test_a_gpu_that_jax_cannot_use_is_one_line(capsys):
    """jax's log is silenced, but for this line of it."""
    cli.silence_libraries()
    log = logging.getLogger("jax._src.xla_bridge")
    log.warning(
        "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed. Falling back to cpu."
    )
    log.warning("Something else")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"jepax: warning: the NVIDIA GPU here is not used; install {CUDA_INSTALL}"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_platform_that_is_not_there_is_named(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "jepax.cli", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("jepax: JAX_PLATFORMS=cuda: jax finds no such device here")
