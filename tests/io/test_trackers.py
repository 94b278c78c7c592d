"""Trackers get every line where they work, and where they do not, training does not notice."""

import importlib.machinery
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from jepax.io import trackers
from jepax.types import UserError

FOREVER = threading.Event()  # nobody sets it


class Fake(ModuleType):
    """Stands for wandb, and for trackio, whose three calls are the same."""

    def __init__(self, init=None, log=None, finish=None):
        super().__init__("fake")
        self.__spec__ = importlib.machinery.ModuleSpec("fake", None)
        self.got, self.begun, self.finished = [], [], []
        self.actions = {"init": init, "log": log, "finish": finish}

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    def login(self, *, prompt, verify):
        return not prompt and not verify

    def act(self, name):
        if self.actions[name] is not None:
            self.actions[name]()

    def init(self, **given):
        self.act("init")
        self.begun.append(given)

    def log(self, numbers, step):
        self.act("log")
        self.got.append((step, numbers))

    def finish(self):
        self.act("finish")
        self.finished.append(threading.current_thread().name)


def raises(error):
    def act():
        raise error

    return act


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """Five lines of a run, sent to fake modules; what was said, and the seconds of the longest call and of the end."""
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.5)

    def call(lines=5, **fakes):
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, trackers.TRACKER_PACKAGES[name], fake)
        said, begin = [], time.perf_counter()
        with trackers.Trackers(list(fakes), tmp_path, {"seed": 3}, said.append) as sending:
            longest = time.perf_counter() - begin
            for step in range(lines):
                start = time.perf_counter()
                sending.send(step, {"step": step, "train/loss": 1.0, "by_block": [2.0, None, 4.0], "lost": None})
                longest = max(longest, time.perf_counter() - start)
            start = time.perf_counter()
        return said, longest, time.perf_counter() - start

    return call


def test_a_good_tracker_gets_every_line_in_order(tracked, tmp_path):
    wandb, trackio = Fake(), Fake()
    assert tracked(wandb=wandb, trackio=trackio)[0] == []
    for fake, name in ((wandb, "wandb"), (trackio, "trackio")):
        assert fake.got == [(step, {"train/loss": 1.0, "by_block/0": 2.0, "by_block/2": 4.0}) for step in range(5)]
        assert fake.begun[0]["config"] == {"seed": 3} and fake.begun[0]["resume"] == "allow"
        assert fake.finished == [f"tracker {name}"]  # and not the thread of training
    assert wandb.begun[0]["name"] == tmp_path.name


def test_a_continued_run_goes_on_in_the_same_run_of_the_tracker(tracked, tmp_path):
    fakes = [{"wandb": Fake(), "trackio": Fake()} for _ in range(2)]
    for each in fakes:
        tracked(**each)
    (first, second), (named, again) = ([each[name].begun[0] for each in fakes] for name in ("wandb", "trackio"))
    assert first["id"] == second["id"] == (tmp_path / "tracker_id").read_text().strip()
    assert named["name"] == again["name"] == f"{tmp_path.name}-{first['id']}"


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_what_a_tracker_raises_is_said_once(where, error, tracked):
    good = Fake()
    said, longest, _ = tracked(wandb=Fake(**{where: raises(error)}), trackio=good)
    assert len(said) == 1 and said[0].startswith(f"wandb: {type(error).__name__}")
    assert "training goes on; metrics.jsonl is complete" in said[0]
    assert len(said[0].splitlines()) == 1 and len(good.got) == 5 and longest < 0.3


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_neither_slows_nor_keeps_the_run(where, tracked):
    good = Fake()
    said, longest, end = tracked(wandb=Fake(**{where: FOREVER.wait}), trackio=good)
    assert longest < 0.3 and 0.4 < end < 1.5 and len(good.got) == 5
    assert len(said) == 1 and said[0].startswith("wandb: no answer within 0.5 s of the run's end")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("tracker"))


def test_all_trackers_together_are_waited_for_once(tracked):
    said, _, end = tracked(wandb=Fake(init=FOREVER.wait), trackio=Fake(init=FOREVER.wait))
    assert end < 0.9 and len(said) == 2


def test_a_slow_tracker_drops_lines_and_says_how_many(tracked, monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 3)
    slow = Fake(log=lambda: time.sleep(0.05))
    said, longest, _ = tracked(lines=50, wandb=slow)
    assert longest < 0.3 and 3 <= len(slow.got) < 10
    assert said == [
        f"wandb: too slow for {50 - len(slow.got)} of 50 steps, which were dropped; metrics.jsonl is complete"
    ]


def test_nobody_is_asked_for_a_login_at_the_terminal(tracked):
    fake = Fake()
    fake.login = lambda *, prompt, verify: False
    said = tracked(wandb=fake)[0]
    assert not fake.begun and len(said) == 1 and "wandb login" in said[0]
    fake.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    assert tracked(wandb=fake)[0] == [] and len(fake.got) == 5


def test_tensorboard_is_a_writer_in_the_runs_folder(tracked, tmp_path):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(folder)

        def add_text(self, name, text):
            assert name == "config" and '"seed": 3' in text

        def add_scalar(self, *given):
            calls.append(given)

        def close(self):
            calls.append("closed")

    fake = Fake()
    fake.SummaryWriter = Writer
    assert tracked(lines=1, tensorboard=fake)[0] == []
    scalars = [("train/loss", 1.0, 0), ("by_block/0", 2.0, 0), ("by_block/2", 4.0, 0)]
    assert calls == [str(tmp_path / "tensorboard"), *scalars, "closed"]


def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch):
    for name, package in trackers.TRACKER_PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf'train.loggers={name}: .*pip install "jepax\[{name}\]"'):
            trackers.Trackers([name], tmp_path, {}, print)
    with trackers.Trackers([], tmp_path, {}, print) as none:
        none.send(0, {"train/loss": 1.0})
    assert not list(tmp_path.iterdir())
