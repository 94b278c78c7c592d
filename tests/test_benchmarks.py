"""The benchmarks that need nothing but the library run."""

import json
import runpy
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
