"""Folders that are read-only, missing, files, or not to be entered."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from jepax.io import checksums
from jepax.io.checkpointer import CheckpointManager
from jepax.training.loop import train
from tests.digest import state_digest
from tests.faults import limits
from tests.faults.limits import STEPS, contents, digests, disk, kept_programs, refused, sound, tiny, whole

pytestmark = pytest.mark.slow_fault  # each trains; together they take minutes

fixtures = digests, disk, kept_programs, whole
NOBODY = 65534


@pytest.fixture
def wanted(tmp_path):
    return limits.written(tiny(), tmp_path)


@contextmanager
def forbidden(folder, mode):
    """Within, this process has these rights on the folder and is not root, whom no permission stops."""
    folder.chmod(mode)
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def open_place():
    """A folder that anybody may pass, unlike those that pytest makes for root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def owned(folder):
    """Everything below belongs to whom `forbidden` becomes."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, -1)


@contextmanager
def readable(wanted):
    """A copy of the config that anybody may read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield shutil.copy(wanted, Path(name) / "wanted.yaml")


@pytest.mark.fault(21, "a read-only disk")
@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_is_named(begun, disk, whole, wanted, capsys):
    run = disk.path / "run"
    if begun:
        shutil.copytree(whole.run, run)
        shutil.rmtree(run / f"checkpoints/{STEPS:08d}")
    before = contents(disk.path)
    disk.read_only()
    assert f"Read-only file system: {run}" in refused(capsys, "train", wanted, "--run-dir", run)
    assert contents(disk.path) == before


@pytest.mark.fault(21, "a disk that becomes read-only while a run trains")
def test_a_disk_that_becomes_read_only_ends_the_run(disk, whole, wanted, capsys, monkeypatch):
    run, save = disk.path / "run", CheckpointManager.save

    def lost(saver, step, state, note):
        if step == 3:
            saver.wait()
            limits.mount("-o", "bind", str(run / "checkpoints"), str(run / "checkpoints"))
            limits.mount("-o", "remount,bind,ro", str(run / "checkpoints"))
        save(saver, step, state, note)

    monkeypatch.setattr(CheckpointManager, "save", lost)
    try:
        said = refused(capsys, "train", wanted, "--run-dir", run)
    finally:
        limits.unmount(run / "checkpoints")
        monkeypatch.undo()
    assert f"checkpoint {run / 'checkpoints/00000003'} could not be written" in said and "Read-only" in said
    assert sound(run) == [1, 2]
    assert state_digest(train(tiny(), run)) == whole.digest


@pytest.mark.fault(21, "no right to write")
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written_is_named(begun, whole, open_place, wanted, capsys):
    run = open_place / "place" / "run"
    if begun:
        shutil.copytree(whole.run, run)
    run.parent.mkdir(exist_ok=True)
    owned(run.parent)
    before = contents(open_place)
    with readable(wanted) as config, forbidden(run if begun else run.parent, 0o555):
        said = refused(capsys, "train", config, "--run-dir", run)
    assert f"Permission denied: {run}" in said
    assert contents(open_place) == before


@pytest.mark.fault(21, "checkpoints that cannot be read")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o600])
def test_checkpoints_that_cannot_be_read_are_no_new_beginning(mode, whole, open_place, wanted, capsys):
    run = open_place / "run"
    shutil.copytree(whole.run, run)
    owned(run)
    before = contents(run)
    with readable(wanted) as config, forbidden(run / "checkpoints", mode):
        said = refused(capsys, "train", config, "--run-dir", run)
    assert f"Permission denied: {run / 'checkpoints'}" in said
    assert contents(run) == before


@pytest.mark.fault(21, "a file where a folder belongs")
@pytest.mark.parametrize("place", ["run", "run/deeper", "run/deeper/still"])
def test_a_file_where_the_run_belongs_is_named(place, wanted, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    said = refused(capsys, "train", wanted, "--run-dir", tmp_path / place)
    assert str(tmp_path / "run") in said
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.fault(21, "a file where a folder belongs")
def test_a_file_where_checkpoints_belong_is_named(whole, wanted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("a file")
    before = contents(run)
    assert f"Not a directory: {run / 'checkpoints'}" in refused(capsys, "train", wanted, "--run-dir", run)
    assert contents(run) == before


@pytest.mark.fault(21, "no data")
def test_a_missing_root_of_the_data_is_named(whole, tmp_path, capsys):
    nowhere, run = tmp_path / "nowhere", tmp_path / "run"
    data = replace(tiny().data, dataset="image_folder", root=str(nowhere))
    config = limits.written(replace(tiny(), data=data), tmp_path)
    assert f"data.root={nowhere}" in refused(capsys, "train", config, "--run-dir", run)
    assert not run.exists()
    shutil.copytree(whole.run, run)
    before = contents(run)
    assert f"data.root={nowhere}" in refused(capsys, "train", config, "--run-dir", run)
    assert contents(run) == before


@pytest.mark.fault(21, "checkpoints removed while a run trains")
@pytest.mark.parametrize("what", ["checkpoints/00000002", "checkpoints"])
def test_checkpoints_removed_between_saves_do_not_harm_the_next(what, whole, tmp_path, monkeypatch):
    run, save = tmp_path / "run", CheckpointManager.save

    def lost(saver, step, state, note):
        if step == 3:
            saver.wait()
            shutil.rmtree(run / what)
        save(saver, step, state, note)

    monkeypatch.setattr(CheckpointManager, "save", lost)
    assert state_digest(train(tiny(), run)) == whole.digest
    assert sound(run) == ([1, 3, 4] if what.endswith("2") else [3, 4])


@pytest.mark.fault(21, "the run's folder removed while it trains")
def test_a_run_whose_folder_is_removed_loses_no_checkpoint_in_silence(whole, tmp_path, wanted, capsys, monkeypatch):
    """While one is being written: it is named. The next command begins anew, for nothing is left."""
    run, sums = tmp_path / "run", checksums.compute_checksums

    def lost(folder):
        if folder.name.startswith("00000002"):
            shutil.rmtree(run)
        return sums(folder)

    monkeypatch.setattr(checksums, "compute_checksums", lost)
    said = refused(capsys, "train", wanted, "--run-dir", run)
    assert f"checkpoint {run / 'checkpoints/00000002'} could not be written" in said
    monkeypatch.undo()
    assert state_digest(train(tiny(), run)) == whole.digest
