"""Files of a run that were damaged while nobody was in its folder: checkpoints, and lines that a crash tore."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from jepax.io import checkpoint, checksums, events, logger
from jepax.io.checkpointer import CheckpointConfig
from jepax.io.events import Events
from jepax.training.loop import train
from jepax.types import UserError
from tests.faults.runs import result, same, tiny

CONFIG = tiny(steps=6, log_every_steps=1, checkpoint=CheckpointConfig(every_steps=2, max_to_keep=3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(CONFIG, run)
    assert checkpoint.list_steps(run / "checkpoints") == [2, 4, 6]
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def fill(path):
    """Zeros in its place, of the same length."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {"truncated": truncate, "one bit flipped": flip, "zeros": fill, "deleted": Path.unlink}


def damaged(path, damage):
    """The same folder as before, but for this file. Yields nothing where the file is empty and stays."""
    content = path.read_bytes()
    if content or damage == "deleted":
        DAMAGES[damage](path)
        yield path
        path.write_bytes(content)


@pytest.mark.fault(5, "a checkpoint is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_the_one_before_is_taken(run, damage):
    folder = run / "checkpoints"
    files = [path for path in sorted((folder / "00000006").rglob("*")) if path.is_file()]
    assert len(files) > 8 and checkpoint.latest_valid(folder) == (6, {})
    for file in files:
        for path in damaged(file, damage):
            step, corrupt = checkpoint.latest_valid(folder)
            assert step == 4 and list(corrupt) == [6], path
            assert path.relative_to(folder / "00000006").as_posix() in corrupt[6][0]
    assert checkpoint.latest_valid(folder) == (6, {})


@pytest.mark.fault(5, "a checkpoint is damaged")
def test_a_bit_anywhere_in_the_manifest_counts(run):
    path = run / "checkpoints/00000006" / checksums.MANIFEST_FILE
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        assert checkpoint.verify(run / "checkpoints", 6), place


@pytest.mark.fault(5, "a checkpoint's folder is empty")
def test_an_empty_folder_is_a_damaged_checkpoint(run):
    (run / "checkpoints/00000008").mkdir()
    assert checkpoint.latest_valid(run / "checkpoints") == (6, {8: ["manifest.json is missing"]})


@pytest.mark.fault(5, "a checkpoint is damaged")
def test_training_goes_on_from_the_one_before_and_keeps_the_damaged_one(run, trained, capsys):
    folder = run / "checkpoints"
    flip(max((folder / "00000006").rglob("?" * 32), key=lambda path: path.stat().st_size))
    before = contents(folder / "00000006")
    train(CONFIG, run)
    said = capsys.readouterr().err
    assert f"warning: checkpoint {folder / '00000006'} is corrupt; moved to 00000006.corrupt: arrays/state/" in said
    assert "continuing after step 4" in said
    assert contents(folder / "00000006.corrupt") == before
    same(run, trained)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but the lock's, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.fault(6, "every checkpoint is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_sound_nothing_is_trained_and_nothing_touched(run, damage):
    for step in ("00000002", "00000004", "00000006"):
        DAMAGES[damage](run / "checkpoints" / step / checkpoint.METADATA_FILE)
    before = contents(run)
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid") as caught:
        train(CONFIG, run)
    assert all(step in str(caught.value) for step in ("00000006", "00000004", "00000002"))
    assert contents(run) == before


LINE = json.dumps({"step": 6, "train/loss": 0.5, "name": "torn"}).encode()
TORN = {
    "half a line": LINE[: len(LINE) // 2],
    "half a line, ended": LINE[: len(LINE) // 2] + b"\n",
    "no end of line": LINE,
    "no text": b'{"step": 6, "lo\xff\xfe\x80',
    "no text, ended": b"\xc3\x28\xff\n",
    "zeros": bytes(400),
    "zeros after half a line": LINE[:10] + bytes(400),
    "no object": b"6",
    "an empty line": b"\n\n",
}
"""What a crash may leave at the end of a file: cut at any byte, or lengthened before its content is written."""


@pytest.fixture(params=TORN)
def torn(request):
    return TORN[request.param]


@pytest.mark.fault(22, "a line of the log is torn")
def test_a_torn_log_is_read_and_mended(trained, tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = (trained / "metrics.jsonl").read_bytes()
    path.write_bytes(whole + torn)
    assert logger.read_metrics(path)[:6] == logger.read_metrics(trained / "metrics.jsonl")
    with logger.Log(path, steps=8, start=6) as log:
        log.write(6, {"train/loss": 1.0, "perf/images_per_sec": 1.0, "perf/step_time": 1.0})
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:6]) == whole and json.loads(lines[6])["step"] == 6 and len(lines) == 7


@pytest.mark.fault(22, "a line of the events is torn")
def test_torn_events_are_read_and_mended(tmp_path, torn):
    path = tmp_path / events.EVENTS_FILE
    Events(tmp_path).add("started", 0)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(torn.replace(b'"step": 6, ', b'"event": "clipped", "step_bound": true, "step": 6, '))
    assert events.read_jsonl(path)[0]["event"] == "started"
    Events(tmp_path).truncate_from(6)
    Events(tmp_path).add("resumed", 6)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == whole and json.loads(lines[1])["event"] == "resumed" and len(lines) == 2


@pytest.mark.fault(22, "a line of the log is torn")
def test_training_goes_on_with_torn_lines(run, trained, capsys):
    """The log lost the line of the last step, which is taken again: its checkpoint is gone too."""
    shutil.rmtree(run / "checkpoints/00000006")
    for name in ("metrics.jsonl", events.EVENTS_FILE):
        path = run / name
        path.write_bytes(path.read_bytes()[:-20] + b"\xff" + bytes(64))
    train(CONFIG, run)
    assert "1 lines that a crash corrupted are dropped" in capsys.readouterr().err
    assert [line["event"] for line in events.read_jsonl(run / events.EVENTS_FILE)] == ["resumed"]
    assert result(run) == result(trained)
    same(run, trained)
