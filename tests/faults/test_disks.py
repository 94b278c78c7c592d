"""A disk that is full, and one that is slow."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jepax.health import alerts
from jepax.io import atomic, checkpoint, checkpointer, checksums, logger
from jepax.io.checkpointer import CheckpointConfig
from jepax.io.logger import Log
from jepax.training import evaluation
from jepax.training.loop import train
from tests.digest import state_digest
from tests.faults import limits
from tests.faults.conftest import ROOT
from tests.faults.limits import (
    STEPS,
    command,
    contents,
    digests,
    disk,
    half_of,
    kept_programs,
    parts,
    refused,
    sound,
    tiny,
    whole,
)

SAVES = CheckpointConfig(every_steps=2, max_to_keep=99)
fixtures = digests, disk, kept_programs, whole
pytestmark = [pytest.mark.slow_fault, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.mark.fault(7, "the disk is full when a checkpoint is written")
def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(disk, whole, digests, tmp_path, capsys):
    run, wanted = disk.path / "run", limits.written(tiny(), tmp_path)
    disk.resize(f"{int(2.6 * whole.size()) // 1024}k")
    said = refused(capsys, "train", wanted, "--run-dir", run)
    assert str(run / "checkpoints/00000003") in said and "No space left" in said
    assert sound(run) == [1, 2] and parts(run) == []
    again = refused(capsys, "train", wanted, "--run-dir", run)
    assert "00000003" in again and "No space left" in again
    assert sound(run) == [1, 2] and parts(run) == []
    disk.resize("64m")
    command(capsys, "train", wanted, "--run-dir", run, code=0)
    assert digests == [whole.digest] and sound(run) == [1, 2, 3, 4]
    assert [line["step"] for line in logger.read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3]


def fills(disk, monkeypatch, owner, name, when):
    """The disk is full from the first call of this function on for whose arguments `when` holds."""
    real = getattr(owner, name)

    def filled(*arguments, **named):
        if when(*arguments) and not (disk.path / "filling").exists():
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint"):
                    thread.join()
            disk.fill()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, filled)


MOMENTS = {
    "config.yaml": (atomic, "atomic_write", lambda path, text: path.name == "config.yaml"),
    "data.json": (atomic, "atomic_write", lambda path, text: path.name == "data.json"),
    "metrics.jsonl": (Log, "write", lambda log, step, values: step == 2),
    "health.json": (atomic, "atomic_write", lambda path, text: path.name == "health.json"),
    "events.jsonl": (atomic, "append_text", lambda path, text: path.name == "events.jsonl"),
    "lock": (atomic, "with_path_in_error", lambda path: path.name == "lock"),
}


@pytest.mark.fault(7, "the disk is full when another file is written")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_spoils_no_other_file(moment, disk, whole, digests, tmp_path, capsys, monkeypatch):
    run, wanted = disk.path / "run", limits.written(tiny(checkpoint=SAVES), tmp_path)
    fills(disk, monkeypatch, *MOMENTS[moment])
    said = refused(capsys, "train", wanted, "--run-dir", run)
    assert f"No space left on device: {run / moment}" in said
    assert sound(run) == ([2] if moment == "metrics.jsonl" else []) and parts(run) == []
    (disk.path / "filling").unlink()
    monkeypatch.undo()
    assert state_digest(train(tiny(checkpoint=SAVES), run)) == whole.digest
    assert [line["step"] for line in logger.read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3]
    for name in ("metrics.jsonl", "events.jsonl"):
        assert all(map(json.loads, (run / name).read_text().splitlines())), name
    assert alerts.load_alerts(run) == []


@pytest.mark.fault(7, "the disk is full when a run goes on")
@pytest.mark.parametrize("name", ["config.yaml", "data.json", "metrics.jsonl", "health.json", "events.jsonl"])
def test_what_was_there_stays_where_its_new_self_does_not_fit(name, disk, whole, tmp_path, capsys, monkeypatch):
    run, other = half_of(whole, disk.path), tiny(log_every_steps=2)
    before = contents(run)
    fills(disk, monkeypatch, atomic, "atomic_write", lambda path, text: path.name == name)
    said = refused(capsys, "train", limits.written(other, tmp_path), "--run-dir", run)
    assert f"No space left on device: {run / name}" in said
    assert contents(run)[name] == before[name] and contents(run).keys() == before.keys()
    (disk.path / "filling").unlink()
    monkeypatch.undo()
    assert state_digest(train(other, run)) == whole.digest


@pytest.mark.fault(7, "the disk is full within a line")
def test_a_line_that_did_not_fit_is_left_out_by_the_next_command(disk, whole, tmp_path, capsys, monkeypatch):
    run = disk.path / "run"
    shutil.copytree(whole.run, run)
    path = run / "events.jsonl"
    room = 4096 - 20 - path.stat().st_size  # but for 20 bytes of the page that its end lies on
    atomic.append_text(path, json.dumps({"event": "filling", "step": 0, "x": "x" * (room - 42)}) + "\n")
    fills(disk, monkeypatch, atomic, "append_text", lambda path, text: True)
    assert f"No space left on device: {path}" in refused(
        capsys, "train", limits.written(tiny(), tmp_path), "--run-dir", run
    )
    assert 4076 <= len(path.read_text()) <= 4096 and not path.read_text().endswith("\n")
    (disk.path / "filling").unlink()
    monkeypatch.undo()
    assert state_digest(train(tiny(), run)) == whole.digest
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["started", "filling", "resumed"]


@pytest.mark.fault(8, "saves faster than the disk")
def test_every_checkpoint_is_written_however_slow_the_disk(whole, tmp_path, monkeypatch, capsys):
    sums = checksums.compute_checksums
    monkeypatch.setattr(checksums, "compute_checksums", lambda folder: time.sleep(0.3) or sums(folder))
    monkeypatch.setattr(checkpointer, "SLOW_SAVE_WARNING_S", 0.05)
    last = train(tiny(), tmp_path)
    monkeypatch.undo()
    assert sound(tmp_path) == list(range(1, STEPS + 1))
    for step in sound(tmp_path):
        saved = [checkpoint.restore(run / "checkpoints", step, last) for run in (tmp_path, whole.run)]
        assert int(saved[0].step) == step and len({state_digest(state) for state in saved}) == 1
    assert "the disk is slower than train.checkpoint.every_steps" in capsys.readouterr().err


@pytest.mark.slow_fault
@pytest.mark.fault(7, "the disk is full when a checkpoint is written")
def test_the_command_says_so_in_a_few_lines(processes, disk, whole, tmp_path):
    """In a process of its own, where whatever libraries print is seen too; and with the evaluation at the end."""

    def trained(run, code):
        process = processes.start("limits", "train", limits.written(tiny(), tmp_path), "--run-dir", str(run))
        assert process.wait(300) == code, processes.said(process)
        return processes.said(process)

    disk.resize(f"{int(2.6 * whole.size()) // 1024}k")
    said = trained(disk.path / "run", 2)
    assert "No space left" in limits.message(said) and "00000003" in limits.message(said)
    disk.resize("64m")
    trained(disk.path / "run", 0)
    trained(tmp_path / "whole", 0)
    ends = [
        evaluation.load_state(tiny(), run, only=checkpoint.ALL_ARRAYS)
        for run in (disk.path / "run", tmp_path / "whole")
    ]
    assert len({state_digest(state) for state in ends}) == 1


@pytest.mark.slow_fault
@pytest.mark.fault(7, "the disk is full, without root's rights")
@pytest.mark.skipif(os.geteuid() == 0, reason="root mounts its disks without a namespace")
def test_these_tests_in_a_namespace():
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("neither root nor a user namespace: no disk can be mounted")
    paths = [str(Path(__file__)), str(Path(__file__).with_name("test_paths.py"))]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "disk", *paths]
    done = subprocess.run(["unshare", "-rm", *tests], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
