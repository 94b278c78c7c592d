"""The same folder again with other settings, other pictures, or other ways of reading them."""

import hashlib
import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jepax.data import batches, open_source
from jepax.distributed.sharding import ShardingConfig
from jepax.io import checkpoint
from jepax.io import config_yaml as configs
from jepax.io import events as happened
from jepax.io.checkpointer import CheckpointConfig
from jepax.training import config as train_config
from jepax.training import evaluation
from jepax.training.config import Config
from jepax.training.loop import train
from tests.contracts.shrink import SIDE
from tests.digest import state_digest
from tests.faults import limits
from tests.faults.limits import STEPS, command, contents, digests, half_of, kept_programs, refused, sound, tiny, whole

pytestmark = pytest.mark.slow_fault  # each trains; together they take minutes

fixtures = digests, kept_programs, whole


ALLOW_SIZE = ["--allow-config-change", "train.batch_size"]
REFUSED = {
    "seed": ("seed: 0 -> 7", ["--seed", "7"]),
    "optim.peak_lr": ("optim.peak_lr: 0.004 -> 0.0005", ["--optim.peak-lr", "5e-4"]),
    "data.synthetic_seed": ("data.synthetic_seed: 0 -> 3", ["--data.synthetic-seed", "3"]),
    "data.val_fraction": ("data.val_fraction: 0.2 -> 0.3", ["--data.val-fraction", "0.3"]),
    "method.predictor.depth": ("method.predictor.depth: 2 -> 1", ["--method.predictor.depth", "1"]),
    "train.steps": ("train.steps: 4 -> 5", ["--train.steps", "5"]),
    "train.grad_guard.on_spike": ("train.grad_guard.on_spike: clip -> skip", ["--train.grad-guard.on-spike", "skip"]),
}


@pytest.mark.fault(17, "other settings in a folder that holds a run")
@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused_with_the_difference(name, whole, tmp_path, capsys):
    run, wanted = half_of(whole, tmp_path), limits.written(tiny(), tmp_path)
    before, (difference, words) = contents(run), REFUSED[name]
    said = refused(capsys, "train", wanted, "--run-dir", run, *words)
    assert difference in said.splitlines() and f"--allow-config-change {name}" in said and str(run) in said
    assert contents(run) == before


@pytest.mark.fault(17, "other settings in a folder that holds a run")
def test_who_insists_goes_on_with_them(whole, digests, tmp_path, capsys):
    run, wanted = half_of(whole, tmp_path), limits.written(tiny(), tmp_path)
    words = ["train", wanted, "--run-dir", run, "--optim.peak-lr", "5e-4"]
    assert "different config" in refused(capsys, *words, "--seed", "7", "--allow-config-change", "optim.peak_lr")
    command(capsys, *words, "--allow-config-change", "optim.peak_lr", code=0)
    assert digests != [whole.digest] and sound(run)[-1] == STEPS
    assert configs.load(Config, run / "config.yaml").optim.peak_lr == 5e-4
    last = happened.read_jsonl(run / "events.jsonl")[-1]
    assert last["event"] == "resumed" and last["changed"] == ["optim.peak_lr: 0.004 -> 0.0005"]
    command(capsys, *words, code=0)  # it is the run's own from now on
    assert "optim.peak_lr: 0.0005 -> 0.004" in refused(capsys, "train", wanted, "--run-dir", run)


@pytest.mark.fault(17, "other settings in a folder that holds a run")
@pytest.mark.parametrize("size, allowed", [(8, []), (32, ["--allow-config-change", "train"])])
def test_another_batch_size_is_refused_also_to_who_insists(size, allowed, whole, tmp_path, capsys):
    """Steps count batches: half of the images would be left out, or seen twice, and the schedules would jump."""
    run, wanted = half_of(whole, tmp_path), limits.written(tiny(), tmp_path)
    before = contents(run)
    said = refused(capsys, "train", wanted, "--run-dir", run, "--train.batch-size", size, *allowed)
    assert f"train.batch_size: 16 -> {size}" in said and "resume with that size" in said
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints")  # nothing is trained, so nothing is counted in steps
    command(capsys, "train", wanted, "--run-dir", run, "--train.batch-size", size, *(allowed or ALLOW_SIZE), code=0)


@pytest.mark.fault(17, "other settings in a folder that holds a run")
def test_a_finished_run_keeps_its_config(whole, tmp_path, capsys):
    """No step is taken, so the config that trained stays."""
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    before = (run / "config.yaml").read_bytes()
    words = ["--train.log-every-steps", "3", "--run-dir", run]
    command(capsys, "train", limits.written(tiny(), tmp_path), *words, code=0)
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.fault(17, "other settings in a folder that holds a run")
@pytest.mark.parametrize("name", ["optim.peek_lr", "peak_lr", "optimizer", "everything"])
def test_what_is_allowed_must_be_a_setting(name, whole, tmp_path, capsys):
    run = half_of(whole, tmp_path)
    before = contents(run)
    said = refused(
        capsys,
        "train",
        limits.written(tiny(), tmp_path),
        "--run-dir",
        run,
        "--seed",
        "7",
        "--allow-config-change",
        name,
    )
    assert f"--allow-config-change {name}: no field or group of fields" in said
    assert contents(run) == before


@pytest.mark.fault(17, "a folder that lost its config")
def test_checkpoints_without_a_config_are_refused(whole, tmp_path, capsys):
    run, wanted = half_of(whole, tmp_path), limits.written(tiny(), tmp_path)
    (run / "config.yaml").unlink()
    before = contents(run)
    said = refused(capsys, "train", wanted, "--run-dir", run, "--seed", "7")
    assert f"{run} has checkpoints, but no config.yaml" in said
    assert contents(run) == before


@pytest.mark.fault(17, "another model in a folder that holds a run")
def test_a_model_that_does_not_fit_is_an_error_also_for_who_insists(whole, tmp_path, capsys):
    run, wanted = half_of(whole, tmp_path), limits.written(tiny(), tmp_path)
    before = contents(run)
    words = ["--method.predictor.depth", "1", "--allow-config-change", "method.predictor"]
    said = refused(capsys, "train", wanted, "--run-dir", run, *words)
    assert "is of another model than this config builds" in said and "method.predictor" in said
    assert contents(run) == before


@pytest.mark.fault(17, "settings that training does not depend on")
def test_settings_that_do_not_matter_may_change(whole, digests, tmp_path, capsys):
    run = half_of(whole, tmp_path)
    config = tiny(
        log_every_steps=3, checkpoint=CheckpointConfig(every_steps=3, max_to_keep=1), sharding=ShardingConfig("ddp")
    )
    config = replace(config, data=replace(config.data, num_threads=1, max_corrupt_fraction=0.5, root="elsewhere"))
    config = replace(config, eval=replace(config.eval, protocols=("linear",)))
    changed = {line.split(":")[0] for line in configs.diff(tiny(), config)}
    assert {
        name
        for name in train_config.RESUMABLE_FIELDS
        if not any(train_config.matches_prefix(path, [name]) for path in changed)
    } == {
        "data.num_workers",  # by a process of its own, below
        "train.loggers",
        "train.grad_accum_steps",  # gives the same losses but for the rounding of sums: tests/test_sharding.py
    }
    command(capsys, "train", limits.written(config, tmp_path), "--run-dir", run, code=0)
    assert digests == [whole.digest] and configs.load(Config, run / "config.yaml") == config


def hashed(source, **reading):
    """One hash over every array of the batches of steps 3 to 8, over two epochs."""
    found = hashlib.sha256()
    for images in batches(source, batch_size=16, steps=9, start=3, seed=5, **reading):
        for array in (images.canvas, images.size, images.index, images.label):
            found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@pytest.mark.fault(9, "other threads and workers")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_do_not_depend_on_threads_and_workers(workers):
    source = open_source(tiny().data, "train")
    usual = hashed(source, num_threads=0)
    for threads in (1, 8):
        assert hashed(source, num_threads=threads, num_workers=workers) == usual
    other = open_source(replace(tiny().data, synthetic_seed=1), "train")
    assert hashed(other, num_threads=1) != usual


@pytest.mark.slow_fault
@pytest.mark.fault(9, "other threads and workers when a run goes on")
def test_a_run_goes_on_with_other_threads_and_workers(processes, tmp_path):
    """Parts of two steps each, by 0, 2, 3 and 1 workers, against one process that reads in its own thread."""
    longer = tiny(steps=8)

    def take(run, workers, threads, until):
        config = replace(longer, data=replace(longer.data, num_threads=threads, num_workers=workers))
        process = processes.start("limits", "part", limits.written(config, tmp_path), str(run), str(until))
        assert process.wait(300) == 0, processes.said(process)
        assert checkpoint.list_steps(run / "checkpoints")[-1] == until

    take(tmp_path / "whole", workers=0, threads=0, until=8)
    for until, workers, threads in ((2, 0, 1), (4, 2, 8), (6, 3, 1), (8, 1, 8)):
        take(tmp_path / "parts", workers, threads, until)
    ends = [evaluation.load_state(longer, tmp_path / run, only=checkpoint.ALL_ARRAYS) for run in ("whole", "parts")]
    assert len({state_digest(state) for state in ends}) == 1


GRAYS = {"cat": 40, "dog": 200}


@pytest.fixture
def root(tmp_path):
    """Sixteen pictures each of cats and dogs to train on, and two of each in val/."""
    root = tmp_path / "data"
    for (name, gray), (split, count) in itertools.product(GRAYS.items(), {"train": 16, "val": 2}.items()):
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            suffix = "jpg" if number % 2 else "png"
            picture(gray + number).save(root / split / name / f"{number:02}.{suffix}")
    return root


def picture(gray):
    return Image.fromarray(np.full((SIDE, SIDE), gray, np.uint8))


def add(root):
    picture(1).save(root / "train/dog/99.png")
    return "class dog: 16 files, ", " -> 17 files, "


def remove(root):
    (root / "train/cat/03.jpg").unlink()
    return "class cat: 16 files, ", " -> 15 files, "


def add_class(root):
    (root / "train/emu").mkdir()
    picture(1).save(root / "train/emu/0.png")
    return "class emu: (absent) -> 1 file, ", ""


@pytest.mark.fault(18, "a file added to the data or removed from it")
@pytest.mark.parametrize("change", [add, remove, add_class])
def test_other_pictures_are_refused_and_who_insists_goes_on(change, root, tmp_path, capsys, digests):
    """After two of four steps, through the command line."""
    run, config = tmp_path / "run", tiny()
    data = replace(config.data, dataset="image_folder", root=str(root), val_fraction=0.1)
    config = replace(config, data=data)
    train(config, run)
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/{step:08d}")
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    shutil.rmtree(begun / "checkpoints")
    before, (old, new) = contents(run), change(root)
    wanted = limits.written(config, tmp_path)
    said = refused(capsys, "train", wanted, "--run-dir", run)
    assert "was trained on other data, 1 part differs" in said and old in said and new in said
    assert "--allow-config-change data" in said and contents(run) == before
    command(capsys, "train", wanted, "--run-dir", run, "--allow-config-change", "data", code=0)
    assert sound(run) == [1, 2, 3, 4] and len(digests) == 1
    command(capsys, "train", wanted, "--run-dir", run, code=0)  # they are the run's own from now on
    command(capsys, "train", wanted, "--run-dir", begun, code=0)  # nothing was trained on the others
