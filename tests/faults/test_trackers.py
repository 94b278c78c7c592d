"""A tracker behind a network that refuses, or that takes a connection and never answers."""

import importlib.machinery
import socket
import sys
import time
import urllib.request
from types import ModuleType, SimpleNamespace

import pytest

from jepax.io import trackers
from jepax.io.logger import Log, read_metrics

pytestmark = pytest.mark.fault(23, "tracker or network unreachable")


@pytest.fixture
def refused():
    """A port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, and it refuses
        yield taken.getsockname()[1]


@pytest.fixture
def silent():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def over_network(port):
    """A tracker that asks a server at each call, as a client without time limits does."""

    def ask(*_, **__):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(f"http://127.0.0.1:{port}/").close()

    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))
    module.login = lambda **_: True
    module.init = module.log = module.finish = ask
    return module


@pytest.mark.parametrize(("network", "word"), [("refused", "Connection refused"), ("silent", "no answer within 0.5 s")])
def test_a_run_ends_as_without_a_tracker(network, word, request, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", over_network(request.getfixturevalue(network)))
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.5)
    said, start = [], time.perf_counter()
    with (
        Log(tmp_path / "metrics.jsonl", steps=20, start=0) as log,
        trackers.Trackers(["wandb"], tmp_path, {}, said.append) as views,
    ):
        for step in range(20):
            views.send(step, log.write(step, {"train/loss": 1.0, "perf/images_per_sec": 1.0, "perf/step_time": 1.0}))
        steps = time.perf_counter() - start
    assert steps < 1 and time.perf_counter() - start < 3
    assert len(said) == 1 and word in said[0] and "metrics.jsonl is complete" in said[0], said
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(20))
