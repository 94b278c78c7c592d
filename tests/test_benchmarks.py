"""The benchmarks run; those that need PyTorch only where it is installed."""

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.random as jr
import pytest

from jepax.commands.bench import Bench
from jepax.recipes import RECIPES
from jepax.types import UserError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = """
    --data.dataset synthetic --data.canvas-size 28 --data.channels 1 --data.synthetic-size 80
    --method.encoder.width 24 --method.encoder.depth 1 --method.predictor.width 12 --method.predictor.depth 1
    --train.batch-size 16 --train.steps 30 --optim.warmup-epochs 0.2
""".split()


@pytest.fixture
def compare_torch(monkeypatch):
    """The module of this name in benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("compare_torch")


@pytest.fixture
def tiny():
    """The demo's config, tiny."""
    return Bench.read("bench", ["ijepa_fashion_mnist", *TINY]).config()


@pytest.mark.long
def test_the_benchmark_of_saving_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["saving.py", "--quick", "--json", "found.json"])
    runpy.run_path(str(BENCHMARKS / "saving.py"))["main"]()
    found = json.loads((tmp_path / "found.json").read_text())["demo"]
    assert found["guard"]["guarded_step_s"] > 0 and found["checkpoint"]["megabytes"] > 1


def test_the_benchmark_of_regularizers_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "regularizers.py"))["main"](["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("sigreg", "rdmreg", "visreg's shape"):
        assert found[name]["ours_ms"] > 0 and found[name]["plain_mb"] > 0
    assert found["machine"]["versions"]["jax"]


@pytest.mark.long
def test_the_benchmark_of_a_command_counts_its_programs_cold_and_warm(tmp_path):
    file, words = tmp_path / "found.json", ["--eval.linear.epochs", "1"]
    command = [sys.executable, str(BENCHMARKS / "demo.py"), "--json", str(file), "--"]
    subprocess.run([*command, "train", "ijepa_fashion_mnist", *TINY, *words], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())
    cold, warm = found["cold"], found["warm"]
    assert cold["programs"] == warm["programs"] > 20 and cold["slowest"][0][0] == "jit(jit_train_step)"
    assert warm["compile_s"] < 0.5 * cold["compile_s"] and warm["seconds"] < cold["seconds"]
    assert any("raw pixels" in line for _, line in warm["lines"])


@pytest.mark.long
def test_the_benchmark_of_gpus_runs_without_one(tmp_path):
    file, tasks = tmp_path / "found.json", ("128", "attention")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--json", str(file)]
    subprocess.run([*command, "--recipes", "ijepa_vitb16_in1k", "--tasks", *tasks], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())["ijepa_vitb16_in1k"]
    assert set(found) == set(tasks) and not any("failed" in task for task in found.values())
    assert found["128"]["steps"]["images_per_s"] > 0 and found["attention"]["predictor"]["ours, both"] > 0


def test_pytorchs_step_is_that_of_ijepa(compare_torch):
    with pytest.raises(UserError, match="is I-JEPA's; lejepa_fashion_mnist trains lejepa"):
        compare_torch.compare_with_torch(RECIPES["lejepa_fashion_mnist"](), 1)


@pytest.mark.long
def test_our_step_takes_the_given_views_and_masks_and_trains_on_them(compare_torch, tiny):
    method = compare_torch.make_method(tiny)
    one, other = compare_torch.make_batches(method, 4)
    loss = jax.jit(lambda batch, key: method.loss(batch, key=key)[0])
    assert loss(one, jr.key(0)) == loss(one, jr.key(1)) != loss(other, jr.key(0))
    run = compare_torch.jax_step(method, [one], "float32", log_every_steps=50)
    losses = [run(), run(), run(3)]
    assert losses[0] == pytest.approx(float(loss(one, jr.key(0))), rel=1e-5)
    assert losses[0] > losses[1] > losses[2]


def test_losses_that_differ_end_the_comparison(compare_torch):
    sides = {"ours": lambda: 1.0, "torch, eager": lambda: 1.001}
    assert compare_torch.check_losses_agree(sides, 1e-2) == [[1.0, 1.001]] * compare_torch.CHECKED_STEPS
    with pytest.raises(AssertionError, match="losses of step 0"):
        compare_torch.check_losses_agree(sides, 1e-5)


def test_ratios_of_times(compare_torch):
    found = compare_torch.median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    assert found["ratio"] == 2.0 and found["low"] == 2.0 and found["high"] == 2.5


def test_our_step_and_pytorchs_agree_and_are_timed(compare_torch, tiny):
    pytest.importorskip("torch")
    found = compare_torch.compare_with_torch(tiny, 2, ("eager",))
    assert set(found["against"]) == {"torch, eager"} and found["against"]["torch, eager"]["ratio"] > 0
    assert len(found["losses"]) == compare_torch.CHECKED_STEPS


@pytest.mark.long
def test_the_comparison_takes_settings_and_recipes(tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "step_vs_torch.py"), "--quick", "--json", str(file)]
    subprocess.run([*command, "small_pictures", "ijepa_fashion_mnist", "--train.compute-dtype=float32"], check=True)
    found = json.loads(file.read_text())["settings"]
    assert set(found) == {"small_pictures", "ijepa_fashion_mnist"}
    assert all(each["against"]["torch, compiled"]["ratio"] > 0 for each in found.values())


def test_the_comparison_refuses_other_methods_in_one_line():
    command = [sys.executable, str(BENCHMARKS / "step_vs_torch.py"), "lejepa_fashion_mnist"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode and "is I-JEPA's; lejepa_fashion_mnist trains lejepa" in ended.stderr
    assert "Traceback" not in ended.stderr
