"""Training on sequences of vectors with actions: nothing between the data and the update is about images."""

import math
import os
import signal
from dataclasses import replace

import jax
import jax.random as jr
import numpy as np
import pytest

from jepax.data import Source
from jepax.distributed import preemption, sharding
from jepax.distributed.sharding import ShardingConfig, ShardingPlan, make_mesh
from jepax.io import checkpoint, logger
from jepax.io.checkpointer import CheckpointConfig, CheckpointManager
from jepax.optim import OptimConfig
from jepax.training import nan_dump
from jepax.training.config import Config, TrainConfig
from jepax.training.dry_run import dry_run
from jepax.training.grad_guard import GradGuardConfig
from jepax.training.loop import train
from jepax.training.monitor import DivergedError
from jepax.training.nan_dump import replay
from jepax.training.setup import make_setup
from jepax.training.step import run_train_step
from jepax.types import UserError
from tests.digest import state_digest
from tests.methods.toy import ToyBatch, ToyConfig, toy_batch

SPEED = {"perf/step_time", "perf/images_per_sec"}
STEPS, BATCH = 6, 16
CONFIG = Config(
    method=ToyConfig(state=128, dim=256),  # large enough that its matrices are sharded
    optim=OptimConfig(warmup_epochs=0.1),
    train=TrainConfig(batch_size=BATCH, steps=STEPS, log_every_steps=2, checkpoint=CheckpointConfig(every_steps=4)),
)


class ToySource(Source):
    """Sequences in memory. Those of the rows in `bad` have a state that is not a number."""

    def __init__(self, examples=40, bad=()):
        batch = toy_batch(examples, config=CONFIG.method)
        self.states, self.actions = np.array(batch.states), np.array(batch.actions)
        self.states[list(bad)] = np.nan

    def __len__(self):
        return len(self.states)

    def load(self, row):
        return self.states[row], self.actions[row]

    def collate(self, examples, index):
        states, actions = zip(*examples, strict=True)
        return ToyBatch(np.stack(states), np.stack(actions), index)

    @property
    def fingerprint(self):
        return {"sequences": f"{self.states.shape} {float(np.nansum(self.states)):.6f}"}


SOURCE = ToySource()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing interrupted, and its last state."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    return run, train(CONFIG, run, source=SOURCE)


def records(run):
    lines = logger.read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def test_it_trains_and_logs(finished):
    run, state = finished
    lines = records(run)
    assert int(state.step) == STEPS and checkpoint.list_steps(run / "checkpoints") == [4, 6]
    assert [line["step"] for line in lines] == [0, 1, 3, 5] and lines[-1]["train/loss"] < lines[0]["train/loss"]
    for name in (
        "ema/momentum",
        "ema/update_norm",
        "health/embedding/rankme",
        "train/explained_variance",
        "optim/update_norm",
        "grad_norm/predictor",
    ):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert not any("top1" in name for line in lines for name in line)


def test_it_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    run, state = finished
    save = CheckpointManager.save

    def stop(manager, step, *rest):
        save(manager, step, *rest)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CheckpointManager, "save", stop)
    with pytest.raises(preemption.Preempted):
        train(CONFIG, tmp_path, source=SOURCE)
    monkeypatch.undo()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [4, 5]
    resumed = train(CONFIG, tmp_path, source=SOURCE)
    assert state_digest(resumed) == state_digest(state)
    assert records(tmp_path) == records(run)


def test_other_data_is_refused(finished):
    with pytest.raises(UserError, match="1 part differs"):
        train(CONFIG, finished[0], source=ToySource(41))


def losses(plan):
    """Loss and gradient norm of each step, and the last state."""
    setup = replace(make_setup(CONFIG, SOURCE), plan=plan)
    state, found = setup.init_state(), []
    for batch in setup.batches():
        batch = sharding.shard_batch(batch, plan.mesh)
        state, metrics = run_train_step(state, batch, setup.base_key, setup.context)
        found.append([float(metrics["train/loss"]), float(metrics["optim/grad_norm"])])
    return np.array(found), state


def test_losses_do_not_depend_on_devices_sharding_and_micro_batches():
    usual, _ = losses(ShardingPlan(make_mesh(1)))
    assert len({*usual[:, 0]}) == STEPS
    np.testing.assert_allclose(losses(ShardingPlan(make_mesh()))[0], usual, rtol=1e-5)
    np.testing.assert_allclose(losses(ShardingPlan(make_mesh(), num_microbatches=2))[0], usual, rtol=1e-5)
    found, state = losses(ShardingPlan(make_mesh(), True, True))
    np.testing.assert_allclose(found, usual, rtol=1e-5)
    for weight in (state.method.encoder.weight, state.method.target_encoder.average.weight):
        assert weight.addressable_shards[0].data.size == weight.size // 8


def test_a_sharded_run_saves_and_logs_as_a_replicated_one(finished, tmp_path):
    config = replace(CONFIG, train=replace(CONFIG.train, sharding=ShardingConfig("fsdp")))
    state = train(config, tmp_path, source=SOURCE)
    assert not state.method.encoder.weight.is_fully_replicated
    for ours, theirs in zip(records(tmp_path), records(finished[0]), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)


def test_a_step_that_is_not_finite_is_dumped_and_replayed(tmp_path):
    """Rows that are not numbers, in the first batch that has one; the replay is bit for bit that step."""
    config = replace(CONFIG, train=replace(CONFIG.train, grad_guard=GradGuardConfig(max_consecutive_nonfinite=1)))
    source = ToySource(bad=range(5))
    with pytest.raises(DivergedError, match="1 consecutive steps, up to step") as stopped:
        train(config, tmp_path, source=source)
    (dump,) = (tmp_path / "dumps").iterdir()
    lines = []
    metrics = replay(dump, lines.append, source=source)
    assert math.isnan(metrics["train/loss"]) and "bit-identical" in lines
    batch = nan_dump.read_batch(dump, toy_batch(1, config=CONFIG.method))
    step = stopped.value.step
    assert batch.index.tolist() == list(range(BATCH * step, BATCH * (step + 1))) and np.isnan(batch.states).any()


def test_a_batch_of_other_data_is_not_replayed(tmp_path):
    np.savez(tmp_path / nan_dump.batch_filename(0), **nan_dump.batch_arrays(toy_batch(2)))
    with pytest.raises(UserError, match="other data than the run's: it has states, actions, index"):
        nan_dump.read_batch(tmp_path)


def test_a_dry_run_needs_no_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    dry_run(CONFIG, lines.append, source=SOURCE)
    text = "\n".join(lines)
    assert "40 training examples" in text and "one step of 16 examples ..." in text and "loss " in lines[-1]
    assert not list(tmp_path.iterdir())


def test_a_score_of_images_cannot_choose_its_checkpoints(tmp_path):
    save = CheckpointConfig(best_metric="val/knn_top1")
    with pytest.raises(UserError, match=r"train.checkpoint.best_metric=val/knn_top1 needs .* labeled images"):
        train(replace(CONFIG, train=replace(CONFIG.train, checkpoint=save)), tmp_path, source=SOURCE)


def test_the_initial_state_is_that_of_the_seed():
    """Compiled as one program, which rounds otherwise than the build alone."""
    setup = make_setup(CONFIG, SOURCE)
    expected = CONFIG.method.build(total_steps=STEPS, key=jr.key(CONFIG.seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), setup.init_state().method, expected)
