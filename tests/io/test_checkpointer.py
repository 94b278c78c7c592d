"""When a run saves and what it keeps."""

import os
import threading
from concurrent import futures
from pathlib import Path

import jax.numpy as jnp
import pytest

from jepax.distributed import multihost
from jepax.io import checkpoint, checkpointer, checksums
from jepax.io.checkpointer import CheckpointConfig, CheckpointManager
from jepax.types import UserError

STATE = {"a": jnp.arange(4.0)}


def saver(folder, said=None, **config):
    return CheckpointManager(folder, CheckpointConfig(**config), (said if said is not None else []).append)


def test_by_steps_by_minutes_and_for_ever(tmp_path, monkeypatch):
    clock = iter([0.0, 30.0, 61.0, 62.0, 122.0])
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: next(clock))
    each = saver(tmp_path, every_steps=4, every_minutes=1.0, keep_period=3)
    assert [each.timer_expired() for _ in range(4)] == [False, True, False, True]
    assert [step for step in range(1, 13) if each.should_save(step)] == [3, 4, 6, 8, 9, 12]


def test_the_newest_the_round_and_the_best_are_kept(tmp_path):
    scores = {1: 1.0, 2: 5.0, 3: None, 4: 2.0, 5: None, 6: None}
    with saver(tmp_path, max_to_keep=1, keep_period=4, best_metric="val/knn_top1") as writes:
        for step, score in scores.items():
            writes.save(
                step,
                STATE,
                {} if score is None else {checkpointer.METRICS_KEY: {"val/knn_top1": score, "val/probe_top1": -score}},
            )
    assert checkpoint.list_steps(tmp_path) == [2, 4, 6]


def test_a_step_is_written_once(tmp_path):
    with saver(tmp_path) as writes:
        writes.save(1, STATE, {"first": True})
        writes.save(1, STATE, {})
    assert checkpoint.metadata(tmp_path, 1) == {"first": True}


def test_what_was_never_finished_goes_with_the_next(tmp_path):
    (tmp_path / "00000001.part").mkdir()
    with saver(tmp_path) as writes:
        writes.save(2, STATE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


def test_a_removal_that_is_cut_off_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    """The process may end at any file: none of them goes while the folder still has the name of a checkpoint."""
    removed = []
    monkeypatch.setattr(checkpointer.shutil, "rmtree", lambda path, **_: removed.append(path.name))
    with saver(tmp_path, max_to_keep=1) as writes:
        for step in (1, 2):
            writes.save(step, STATE, {})
    assert checkpoint.list_steps(tmp_path) == [2]
    assert (tmp_path / "00000001.part").is_dir() and removed[-1] == "00000001.part"


def slow_disk(monkeypatch):
    """Checkpoints reach the disk only when the event is set."""
    free, sums = threading.Event(), checksums.compute_checksums
    monkeypatch.setattr(checksums, "compute_checksums", lambda folder: free.wait(20) and sums(folder))
    return free


def test_a_save_lets_training_go_on(tmp_path, monkeypatch):
    free = slow_disk(monkeypatch)
    with saver(tmp_path) as writes:
        writes.save(1, STATE, {})
        assert not writes.should_save(5) and checkpoint.list_steps(tmp_path) == []
        free.set()
    assert checkpoint.list_steps(tmp_path) == [1]


def test_saves_faster_than_the_disk_wait_and_say_so(tmp_path, monkeypatch):
    free, said = slow_disk(monkeypatch), []
    monkeypatch.setattr(checkpointer, "SLOW_SAVE_WARNING_S", 0.05)
    with saver(tmp_path, said, max_to_keep=9) as writes:
        writes.save(1, STATE, {})
        threading.Timer(0.3, free.set).start()
        writes.save(2, STATE, {})
        assert checkpoint.list_steps(tmp_path) == [1]
        monkeypatch.setattr(checkpointer, "SLOW_SAVE_WARNING_S", 20.0)
        writes.save(3, STATE, {})
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3]
    assert len(said) == 1 and "step 2: the checkpoint waits" in said[0]


def test_a_failure_is_raised_at_the_next_step(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "compute_checksums", full)
    writes = saver(tmp_path)
    writes.save(1, STATE, {})
    futures.wait([writes._pending], 20.0)
    with pytest.raises(UserError, match="No space left on device"):
        writes.should_save(2)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
    """Also after a loss of power: each file, whole, the log's lines and the manifest, then the folder's name."""
    order, sync, rename = [], os.fsync, Path.rename
    log, folder = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    log.write_text("a line\n")

    def told(opened):
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        order.append((path, path.stat().st_size if path.is_file() else len(list(path.iterdir()))))
        sync(opened)

    def renamed(path, target):
        order.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(Path, "rename", renamed)
    with CheckpointManager(folder, CheckpointConfig(), print, [log, tmp_path / "absent"]) as writes:
        writes.save(1, STATE, {})
    at = order.index("renamed")
    before, part = order[:at], folder / "00000001.part"
    for path in (folder / "00000001").rglob("*"):
        while_part = part / path.relative_to(folder / "00000001")
        written = part / "manifest.json.part" if path.name == checksums.MANIFEST_FILE else while_part
        assert (written, path.stat().st_size if path.is_file() else len(list(path.iterdir()))) in before
    assert (log, 7) in before and before[-2][0].name == "manifest.json.part" and before[-1][0] == part
    assert order[at + 1][0] == folder


def test_another_error_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "compute_checksums", lambda folder: 1 / 0)
    said = []
    with pytest.raises(KeyError), saver(tmp_path, said) as writes:
        writes.save(1, STATE, {})
        raise KeyError
    assert "could not be written" in said[0]


def test_an_error_is_not_hidden_by_a_lost_peer(tmp_path, monkeypatch):
    lost = futures.Future()
    lost.set_exception(multihost.PeerLostError())
    monkeypatch.setattr(checkpoint, "save_async", lambda *args, **callbacks: lost)
    with pytest.raises(UserError, match="too many"), saver(tmp_path) as writes:
        writes.save(1, STATE, {})
        raise UserError("too many")
    with pytest.raises(multihost.PeerLostError), saver(tmp_path) as writes:
        writes.save(1, STATE, {})


@pytest.mark.parametrize("name", ["every_steps", "every_minutes", "max_to_keep", "keep_period"])
def test_senseless_settings_are_refused(name):
    zero = 0.0 if name == "every_minutes" else 0
    with pytest.raises(UserError, match=rf"train.checkpoint.{name}={zero} must be above 0"):
        CheckpointConfig(**{name: zero})
