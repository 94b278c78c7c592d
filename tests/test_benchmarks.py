"""The benchmarks that need nothing but the library run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.long
def test_the_benchmark_of_saving_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["saving.py", "--quick", "--json", "found.json"])
    runpy.run_path(str(BENCHMARKS / "saving.py"))["main"]()
    found = json.loads((tmp_path / "found.json").read_text())["demo"]
    assert found["guard"]["guarded_step_s"] > 0 and found["checkpoint"]["megabytes"] > 1


def test_the_benchmark_of_regularisers_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "regularisers.py"))["main"](["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("sigreg", "rdmreg", "visreg's shape"):
        assert found[name]["ours_ms"] > 0 and found[name]["plain_mb"] > 0
    assert found["machine"]["versions"]["jax"]


@pytest.mark.long
def test_the_benchmark_of_gpus_runs_without_one(tmp_path):
    file, tasks = tmp_path / "found.json", ("128", "attention")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--json", str(file)]
    subprocess.run([*command, "--recipes", "ijepa_vitb16_in1k", "--tasks", *tasks], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())["ijepa_vitb16_in1k"]
    assert set(found) == set(tasks) and not any("failed" in task for task in found.values())
    assert found["128"]["steps"]["images_per_s"] > 0 and found["attention"]["predictor"]["ours, both"] > 0
