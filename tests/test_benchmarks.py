"""The benchmarks that need nothing but the library run."""

import json
import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_benchmark_of_regularisers_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "regularisers.py"))["main"](["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("sigreg", "rdmreg", "visreg's shape"):
        assert found[name]["ours_ms"] > 0 and found[name]["plain_mb"] > 0
    assert found["machine"]["versions"]["jax"]
