"""What `jepax doctor` says of a run's folder, and that it comes true."""

import fcntl
import json
import shutil

import pytest

from jepax import cli
from jepax.io import checkpoint
from jepax.io import events as happened
from jepax.training.inspect_run import inspect_run
from jepax.training.loop import train
from jepax.types import UserError
from tests.digest import state_digest
from tests.faults import limits
from tests.faults.conftest import compiled
from tests.faults.limits import STEPS, contents, kept_programs, tiny, whole

fixtures = compiled, kept_programs, whole


@pytest.fixture
def run(whole, tmp_path):
    """A finished run's folder."""
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    (run / "lock").touch()
    return run


def examined(run):
    """What is said, as text, and whether all is sound. Nothing in the folder may change by it."""
    before, lines = seen(run), []
    sound = inspect_run(run, lines.append)
    assert seen(run) == before
    assert all("\n" not in line for line in lines)
    return "\n".join(lines), sound


def seen(run):
    files = sorted(run.rglob("*"))
    return [(path, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in files]


def line(said, name):
    """The one line of that name."""
    (found,) = [each for each in said.splitlines() if each.startswith(f"{name} ")]
    return found


def next_of(run, what):
    return f"next          jepax train {run / 'config.yaml'} --run-dir {run}: {what}"


def test_a_checkpoint_that_goes_while_it_is_read_is_not_damaged(run, monkeypatch):
    problems = checkpoint.verify

    def removed(folder, step):
        if step == STEPS - 1:
            shutil.rmtree(folder / f"{step:08d}")
        return problems(folder, step)

    monkeypatch.setattr(checkpoint, "verify", removed)
    said = []
    assert inspect_run(run, said.append) and not any("CORRUPT" in each for each in said)


@pytest.mark.parametrize(
    ("step", "next"), [(STEPS - 1, "nothing is left to train"), (STEPS, "refused: the checkpoints")]
)
def test_a_checkpoint_that_cannot_be_read_is_named(run, monkeypatch, step, next):
    """The next command looks no further than the newest sound one."""
    problems = checkpoint.verify

    def failing(folder, one):
        if one == step:
            raise OSError(5, "Input/output error", str(folder / f"{one:08d}"))
        return problems(folder, one)

    monkeypatch.setattr(checkpoint, "verify", failing)
    said, sound = examined(run)
    assert not sound and f"{step:08d} cannot be read: Input/output error" in said and next in said.splitlines()[-1]


def damage(run, step):
    (run / f"checkpoints/{step:08d}/metadata.json").write_text("{}")


def cut(run, *steps):
    for step in steps:
        shutil.rmtree(run / f"checkpoints/{step:08d}")


def goes_on(run, whole, step):
    """Training resumes after this step, and ends as if nothing had happened."""
    assert state_digest(train(tiny(), run)) == whole.digest
    last = happened.read_jsonl(run / "events.jsonl")[-1]
    assert (last["event"], last["step"]) == ("resumed" if step else "started", step)


def test_a_finished_run(run):
    said, sound = examined(run)
    assert sound
    assert "run           ijepa_fashion_mnist, seed 0, IJEPA" in said and "in use        no" in said
    assert "data          synthetic, 64 training images, as when the run began" in said
    assert [f"checkpoint    {step:08d} ok" in said for step in range(1, STEPS + 1)] == [True] * STEPS
    assert "metrics       4 lines, the last of step 3" in said and "events        started 1" in said
    assert "evaluations   none" in said and "health        no alarm" in said
    assert line(said, "next") == next_of(run, "nothing is left to train; evaluates it")
    before = contents(run)
    train(tiny(), run)
    before.pop("events.jsonl")
    assert before.items() <= contents(run).items()
    (run / "evals").mkdir()
    (run / "evals/step_00000004.json").write_text("{}")
    said, _ = examined(run)
    assert "evaluations   step_00000004.json" in said and said.endswith("evaluates it again")


def test_an_interrupted_run(run, whole):
    cut(run, 3, 4)
    said, sound = examined(run)
    assert sound and line(said, "next") == next_of(run, "resumes after step 2 of 4")
    goes_on(run, whole, 2)


def test_nothing_saved_yet(run, whole):
    cut(run, 1, 2, 3, 4)
    said, sound = examined(run)
    assert sound and "checkpoint    none yet" in said
    assert line(said, "next") == next_of(run, "begins at step 0")
    goes_on(run, whole, 0)


def test_a_damaged_checkpoint_is_named_and_set_aside(run, whole):
    damage(run, 4)
    said, sound = examined(run)
    assert not sound and "checkpoint    00000004 CORRUPT: metadata.json is not what was written (1 in all)" in said
    assert line(said, "next") == next_of(run, "resumes after step 3 of 4, the corrupt ones after it renamed")
    goes_on(run, whole, 3)
    said, sound = examined(run)
    assert (
        sound and "checkpoint    00000004.corrupt: corrupt, renamed when the run was resumed; it may be removed" in said
    )


def test_an_older_damaged_checkpoint_stays_where_it_is(run):
    damage(run, 2)
    said, sound = examined(run)
    assert not sound and "00000002 CORRUPT" in said
    assert line(said, "next") == next_of(run, "nothing is left to train; evaluates it")
    train(tiny(), run)
    assert checkpoint.list_steps(run / "checkpoints") == [1, 2, 3, 4]


def test_no_sound_checkpoint(run):
    for step in range(1, STEPS + 1):
        damage(run, step)
    said, sound = examined(run)
    assert not sound and "checkpoint    none is valid" in said
    assert line(said, "next").endswith("refused: no checkpoint is valid")
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid"):
        train(tiny(), run)


def test_checkpoints_that_cannot_be_read(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("a file")
    said, sound = examined(run)
    assert not sound and f"checkpoint    cannot be read: Not a directory: {run / 'checkpoints'}" in said
    assert line(said, "next").endswith("refused: the checkpoints cannot be read")
    with pytest.raises(NotADirectoryError):
        train(tiny(), run)


def test_an_unfinished_save(run, whole):
    cut(run, 4)
    part = run / "checkpoints/00000004.part"
    part.mkdir()
    said, sound = examined(run)
    assert sound and f"checkpoint    {part.name}: never finished; the next save removes it" in said
    goes_on(run, whole, 3)
    assert not part.exists()


def test_a_folder_in_use(run):
    (run / "checkpoints/00000005.part").mkdir()
    (run / "lock").write_text("process 12 on elsewhere\n")
    with (run / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said, sound = examined(run)
        assert sound and "in use        yes, by process 12 on elsewhere" in said
        assert "checkpoint    00000005.part: being written" in said
        assert line(said, "next").endswith("refused while the folder is in use")
        with pytest.raises(UserError, match="in use by process 12 on elsewhere"):
            train(tiny(), run)


def test_torn_metrics(run):
    path = run / "metrics.jsonl"
    whole_text = path.read_text()
    path.write_bytes(whole_text.encode() + b'{"step": 4, "lo\xff')
    said, sound = examined(run)
    assert not sound and "metrics       4 lines, the last of step 3; 1 CORRUPT, dropped by the next command" in said
    train(tiny(), run)
    assert path.read_text() == whole_text and examined(run)[1]


def test_another_data_set(run):
    (run / "data.json").write_text(json.dumps({"class cat": "3 files, 123"}))
    said, sound = examined(run)
    assert not sound and "was trained on other data" in line(said, "data")
    assert line(said, "next").endswith("refused: the data is missing, or is not the run's")
    with pytest.raises(UserError, match="was trained on other data"):
        train(tiny(), run)


def test_data_that_is_missing(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("dataset: synthetic", "dataset: image_folder\n  root: /nowhere", 1))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("  root: null\n", "", 1))
    said, sound = examined(run)
    assert not sound and "data.root=/nowhere has no folder train/" in line(said, "data")
    assert "refused" in line(said, "next")


def test_broken_pictures_dumps_and_why_training_stopped(run):
    for name, files in (("corrupt.jsonl", (3,)), ("corrupt_1.jsonl", (3, 4))):
        lines = [{"file": f"train/cat/{file}.jpg", "why": "it is empty"} for file in files]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "dumps/step_00000003").mkdir(parents=True)
    (run / "health.json").write_text(json.dumps({"alarms": [], "ended": "2 steps in a row were not finite"}))
    said, sound = examined(run)
    assert sound
    assert f"images        2 corrupt, such as train/cat/3.jpg; listed in {run / 'corrupt*.jsonl'}" in said
    assert f"dump          jepax replay {run / 'dumps/step_00000003'}" in said
    assert line(said, "health").endswith("no alarm; stopped: 2 steps in a row were not finite")
    (run / "health.json").write_text("{")
    said, sound = examined(run)
    assert not sound and "health.json is not what was written" in line(said, "health")
    train(tiny(), run)
    assert line(examined(run)[0], "health").endswith("no alarm")


def test_no_run_at_all(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in ("", "nowhere", "file"):
        said = limits.refused(capsys, "doctor", tmp_path / place)
        assert f"{tmp_path / place} has no config.yaml" in said
    assert "jepax doctor runs/NAME" in limits.refused(capsys, "doctor")


def test_the_exit_code_tells_whether_all_is_sound(run, capsys):
    cli.main(["doctor", str(run)])
    assert "checkpoint    00000004 ok" in capsys.readouterr().out
    damage(run, 4)
    assert limits.command(capsys, "doctor", run, code=1) == ""
