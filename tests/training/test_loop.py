"""The loop on generated pictures: a run's folder, resuming, one program, and a loss that stops being finite."""

import copy
import gc
import json
import os
import shutil
import signal
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.distributed import preemption
from jepax.flops import tree_bytes
from jepax.io import checkpoint, logger
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig, CheckpointManager
from jepax.training import config as train_config
from jepax.training import evaluation, step
from jepax.training import loop as training
from jepax.training.config import Config
from jepax.training.grad_guard import GradGuardConfig
from jepax.training.loop import train
from jepax.types import UserError
from tests.contracts.shrink import BATCH, shrunk
from tests.digest import state_digest

STEPS = 6


@pytest.fixture(scope="module")
def config():
    return shrunk("ijepa_fashion_mnist")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run that nothing interrupted, and the number of training programs that it compiled."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    before = step.jit_train_step._cache_size()
    state = train(config, run)
    return run, state, step.jit_train_step._cache_size() - before


def held_bytes():
    """Of all arrays of this process."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def arrays(state):
    return jax.tree.map(np.asarray, eqx.filter(state, eqx.is_array))


def test_one_training_program_per_run(finished):
    assert finished[2] == 1


def test_a_run_folder_holds_its_config_metrics_and_checkpoints(config, finished):
    run, state, _ = finished
    assert configs.load(Config, run / "config.yaml") == config
    assert checkpoint.list_steps(run / "checkpoints") == [4, 6]
    lines = logger.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 3, 5]
    for name in (
        "train/loss",
        "optim/lr",
        "optim/weight_decay",
        "ema/momentum",
        "optim/grad_norm",
        "grad_norm/predictor",
        "optim/update_norm",
        "ema/update_norm",
        "health/embedding/std",
        "health/embedding/rankme",
        "perf/images_per_sec",
        "train/loss_max",
        "optim/grad_norm_max",
        "train/explained_variance",
        "health/target_norm",
        "health/prediction_norm",
        "ema/relative_distance",
        "ema/expected_update_norm",
        "health/embedding/dead_fraction",
        "health/embedding/mean_cosine",
        "health/embedding/alpha_req",
    ):
        assert all(np.isfinite(line[name]) for line in lines), name
    for name, length in (("encoder_blocks", 2), ("predictor_blocks", 2)):
        assert all(len(line[f"grad_norm/{name}"]) == length for line in lines)
    assert all(len(line["health/embedding/std_quantiles"]) == 5 for line in lines)
    assert json.loads((run / "health.json").read_text()) == {"alarms": [], "ended": None}
    assert int(state.step) == STEPS


def test_a_run_that_stopped_goes_on_where_it_was(config, finished, tmp_path, monkeypatch):
    """Asked to end after step 4 was saved: the rest is the same to the bit, and the log holds every step once."""
    run, whole, _ = finished
    save = CheckpointManager.save

    def stop(saver, step, state, note):
        save(saver, step, state, note)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "save", stop)
    with pytest.raises(preemption.Preempted, match="rerun the same command to resume"):
        train(config, tmp_path)
    monkeypatch.undo()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [4, 5]
    held_before, held = held_bytes(), []
    load = checkpoint.ocp.load
    monkeypatch.setattr(checkpoint.ocp, "load", lambda *given: held.append(held_bytes()) or load(*given))
    resumed = train(config, tmp_path)
    assert len(held) == 1 and held[0] - held_before < 0.1 * tree_bytes(whole)  # the state goes where the first one was
    assert state_digest(whole) == state_digest(resumed)
    speed = {"perf/step_time", "perf/images_per_sec"}
    lines = [
        [{k: v for k, v in line.items() if k not in speed} for line in logger.read_metrics(r / "metrics.jsonl")]
        for r in (run, tmp_path)
    ]
    assert lines[0] == lines[1]  # and so the watchdog says the same


def test_a_finished_run_is_left_alone(config, finished):
    run, state, _ = finished
    before = (run / "metrics.jsonl").read_text()
    jax.tree.map(np.testing.assert_array_equal, arrays(state), arrays(train(config, run)))
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_of_another_config_is_refused(config, finished):
    other = replace(config, optim=replace(config.optim, peak_lr=5e-3))
    with pytest.raises(UserError, match=r"(?s)different config.*optim.peak_lr: .* -> 0.005"):
        train(other, finished[0])


@pytest.mark.parametrize(
    ("lost", "every", "said"),
    [(4, 6, "update's norm of step 3 is nan"), (3, 3, "parameters are not finite after step 2")],
    ids=["at a line", "at a save"],
)
def test_an_update_that_is_not_finite_stops_the_run(lost, every, said, config, tmp_path, monkeypatch):
    """Lines are written at steps 1, 3 and 5. The step after it may have begun, but nothing later is logged or saved."""
    calls = tamper(monkeypatch, {}, lost)
    with pytest.raises(UserError, match=said):
        train(replace(config, train=replace(config.train, checkpoint=CheckpointConfig(every_steps=every))), tmp_path)
    assert len(calls) <= lost + 1
    assert checkpoint.list_steps(tmp_path / "checkpoints") == []


@pytest.mark.long
def test_what_neither_a_line_nor_a_save_sees_ends_the_run_soon(config, tmp_path, monkeypatch):
    """No step after it is finite, so the guard lets none of them change anything."""
    tamper(monkeypatch, {}, 3)
    patient = GradGuardConfig(max_consecutive_nonfinite=2)
    longer = replace(config, train=replace(config.train, log_every_steps=100, steps=20, grad_guard=patient))
    longer = replace(longer, train=replace(longer.train, checkpoint=CheckpointConfig(every_steps=100)))
    with pytest.raises(UserError, match="2 consecutive steps, up to step 4, were not finite"):
        train(longer, tmp_path)


def tamper(monkeypatch, changes, lost=None):
    """Changes the metrics of the steps with these numbers, counted from 1, and makes a parameter NaN in step `lost`.
    Returns a list that grows with the steps."""
    real, calls = training.run_train_step, []

    def broken(*args):
        state, metrics = real(*args)
        calls.append(1)
        if len(calls) == lost:
            state = eqx.tree_at(lambda s: s.method.encoder.norm.bias, state, replace_fn=lambda bias: bias * np.nan)
        return state, metrics | changes.get(len(calls), lambda metrics: {})(metrics)

    monkeypatch.setattr(training, "run_train_step", broken)
    return calls


@pytest.mark.long
@pytest.mark.parametrize(("last", "line"), [(14, 9), (4, 3)])
def test_a_step_between_two_lines_is_not_overlooked(last, line, config, tmp_path, monkeypatch):
    """The loss of the third step alone, of ten to a line, leaps; the run ends later, or at once: both are named."""
    leap = {3: lambda metrics: {"train/loss": 100 * metrics["train/loss"]}}
    tamper(monkeypatch, leap, last)
    longer = replace(
        config, train=replace(config.train, steps=20, log_every_steps=10, checkpoint=CheckpointConfig(every_steps=last))
    )
    with pytest.raises(UserError, match=f"parameters are not finite after step {last - 1}"):
        train(longer, tmp_path)
    lines = logger.read_metrics(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in lines] == [step for step in (0, 9) if step < last]
    written = json.loads((tmp_path / "health.json").read_text())
    assert [(alarm["kind"], alarm["step"]) for alarm in written["alarms"]] == [("spike", line)]
    assert written["ended"].startswith(f"parameters are not finite after step {last - 1}")


def test_another_precision_than_before_is_told(config, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    train(config, run)
    assert "computes in" not in capsys.readouterr().err
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events.replace('"float32"', '"bfloat16"'))
    train(config, run)
    assert "computed in bfloat16 before and computes in float32 here" in capsys.readouterr().err


def test_settings_that_do_not_change_what_is_trained_may_change(config, finished):
    run, state, _ = finished
    other = replace(config, data=replace(config.data, num_threads=1), train=replace(config.train, log_every_steps=3))
    assert state_digest(train(other, run)) == state_digest(state)
    assert configs.load(Config, run / "config.yaml") == config  # no step was taken


def test_the_best_checkpoint_is_kept(tmp_path):
    config = shrunk("ijepa_fashion_mnist")
    online = replace(config.eval.online, every_steps=2, train_images=60, validation_images=16)
    save = CheckpointConfig(every_steps=100, max_to_keep=1, best_metric="val/knn_top1")
    config = replace(config, eval=replace(config.eval, online=online), train=replace(config.train, checkpoint=save))
    train(config, tmp_path)
    scores = {
        line["step"] + 1: line["val/knn_top1"]
        for line in logger.read_metrics(tmp_path / "metrics.jsonl")
        if "val/knn_top1" in line
    }
    best = max(scores, key=lambda step: (scores[step], -step))
    assert checkpoint.list_steps(tmp_path / "checkpoints") == sorted({best, 6})
    metadata = checkpoint.metadata(tmp_path / "checkpoints", best)
    assert metadata["score"] == {"val/knn_top1": scores[best]} and metadata["best"]["val/knn_top1"] == scores[best]


def test_the_metadata_of_a_checkpoint_does_not_change_while_it_is_written(config, tmp_path, monkeypatch):
    """Training goes on meanwhile: later losses are not those of the checkpoint."""
    save, given = CheckpointManager.save, []

    def record(manager, step, state, metadata):
        given.append((metadata, copy.deepcopy(metadata)))
        save(manager, step, state, metadata)

    monkeypatch.setattr(CheckpointManager, "save", record)
    train(replace(config, train=replace(config.train, checkpoint=CheckpointConfig(every_steps=1))), tmp_path)
    assert len(given) == STEPS and any(metadata["peaks"] for metadata, _ in given)
    assert all(metadata == at_its_time for metadata, at_its_time in given)


def test_the_best_of_what_is_not_measured_is_refused(config, tmp_path):
    wanted = replace(config, train=replace(config.train, checkpoint=CheckpointConfig(best_metric="val/knn_top1")))
    with pytest.raises(
        UserError, match=r"train.checkpoint.best_metric=val/knn_top1 needs eval.online.every_steps above 0"
    ):
        train(replace(wanted, eval=replace(config.eval, online=replace(config.eval.online, every_steps=0))), tmp_path)


@pytest.mark.long
def test_a_teacher_in_bfloat16_is_saved_and_restored_as_it_is(tmp_path):
    """It trains, too, with the state's buffers donated; everything else stays in float32."""
    config = shrunk("ijepa_fashion_mnist")
    momentum = replace(config.method.ema, dtype="bfloat16")
    config = replace(config, method=replace(config.method, ema=momentum))
    state = train(config, tmp_path)
    restored = evaluation.load_state(config, tmp_path, only=checkpoint.ALL_ARRAYS)
    for ours, its in zip(jax.tree.leaves(arrays(state)), jax.tree.leaves(arrays(restored)), strict=True):
        np.testing.assert_array_equal(ours, its)
    kept = {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(restored.method.target_encoder, eqx.is_array))}
    assert kept == {jnp.bfloat16.dtype}
    assert restored.method.encoder.embed.weight.dtype == jnp.float32
    assert all(np.isfinite(line["train/loss"]) for line in logger.read_metrics(tmp_path / "metrics.jsonl"))


def test_steps_follow_from_epochs_or_are_given(config):
    epochs = replace(config, train=replace(config.train, steps=None, epochs=2.5))
    assert train_config.compute_total_steps(epochs, 64) == round(2.5 * 64 / BATCH)
    assert train_config.compute_total_steps(config, 64) == STEPS


def test_a_warmup_longer_than_the_run_is_refused(config):
    long = replace(config, optim=replace(config.optim, warmup_epochs=40.0))
    with pytest.raises(UserError, match=r"optim.warmup_epochs=40.0 is 160 steps, but the run has 6"):
        train_config.make_optimizer(long, 64)


def test_a_batch_without_statistics_is_refused(config):
    alone = replace(config, train=replace(config.train, batch_size=1))
    with pytest.raises(UserError, match=r"train\.batch_size=1 has no batch statistics"):
        train_config.validate(alone, train_config.open_source(config.data, "train"))


def test_a_batch_that_the_devices_cannot_share_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"train.batch_size=12 does not divide over 8 devices; try 8"):
        train(replace(config, train=replace(config.train, batch_size=12)), tmp_path)
