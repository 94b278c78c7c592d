"""Steps that would harm a run: what is not finite, and gradients that leap."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from jepax.distributed import preemption
from jepax.io import checkpoint, events, logger
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.training import evaluation, nan_dump
from jepax.training.config import Config
from jepax.training.grad_guard import Action, GradGuardConfig
from jepax.training.loop import train
from jepax.training.monitor import DivergedError, StepInspector
from jepax.training.nan_dump import replay
from tests.contracts.shrink import BATCH, shrunk
from tests.faults.injected import spoilt

pytestmark = pytest.mark.slow_fault
STEPS, SPIKE = 44, 36
BAD = {"nan_activations": (3,), "inf_loss": (5,), "inf_gradient": (7,), "nan_gradient": (40, 41, 42)}


def run_of(guard, **batches):
    """A tiny run that is spoilt in these batches."""
    config = shrunk("ijepa_fashion_mnist")
    config = replace(config, eval=replace(config.eval, online=replace(config.eval.online, every_steps=0)))
    train = replace(
        config.train,
        steps=STEPS,
        log_every_steps=4,
        checkpoint=CheckpointConfig(every_steps=16, max_to_keep=9),
        grad_guard=guard,
    )
    return spoilt(replace(config, train=train), **batches)


def happened(folder, *names):
    """The events of these names."""
    return [line for line in events.read_jsonl(folder / events.EVENTS_FILE) if line["event"] in names]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run with single steps that are not finite, a spike, and then three in a row that end it.

    It was asked to end after the first of the three, and went on: the count is part of the state.
    """
    folder = tmp_path_factory.mktemp("runs") / "spoilt"
    config = run_of(GradGuardConfig(max_consecutive_nonfinite=3), large_gradient=(SPIKE,), **BAD)
    with pytest.raises(preemption.Preempted), asked_to_end_at(39):  # seen in the step after it
        train(config, folder)
    shutil.copytree(folder, folder.with_name("earlier"))
    left = (
        folder / "dumps/step_00000042" / nan_dump.batch_filename(7)
    )  # of more processes, before the steps were taken again
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    with pytest.raises(DivergedError) as end:
        train(config, folder)
    return folder, end.value


@contextmanager
def asked_to_end_at(batch):
    """Within, the process gets a SIGTERM in the step of this batch."""
    with pytest.MonkeyPatch.context() as patch:
        push, asked = StepInspector.push, []

        def ask(self, step, metrics, images):
            push(self, step, metrics, images)
            if images.index[0] // BATCH == batch and not asked:
                asked.append(step)
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(StepInspector, "push", ask)
        yield


@pytest.mark.fault(15, "NaN and Inf in a batch and a gradient")
def test_what_is_not_finite_is_told_with_its_examples(ended):
    told = happened(ended[0], "nonfinite")
    assert [line["step"] for line in told] == [3, 5, 7, 40, 41, 42]
    assert all(line["examples"] == list(range(BATCH * line["step"], BATCH * (line["step"] + 1))) for line in told)
    lines = {line["step"]: line for line in logger.read_metrics(ended[0] / "metrics.jsonl")}
    assert [lines[step]["guard/skipped_steps"] for step in (0, 3, 7, 11, 39)] == [0, 1, 3, 3, 3]
    assert (
        lines[3]["optim/grad_norm"] is None and lines[3]["train/loss"] is None and np.isfinite(lines[39]["train/loss"])
    )
    assert "health/embedding/rankme" not in lines[3] and "health/embedding/rankme" in lines[39]


@pytest.mark.fault(15, "NaN and Inf in a batch and a gradient")
def test_what_is_not_finite_changes_nothing(ended):
    """The state that was saved between the bad steps is, but for counts, that of the dump after them."""
    folder = ended[0]
    before = evaluation.load_state(configs.load(Config, folder / "config.yaml"), folder, 41, only=checkpoint.ALL_ARRAYS)
    after = checkpoint.named_arrays(
        checkpoint.restore(folder / "dumps" / "step_00000042" / nan_dump.STATE_DIR, 42, before)
    )
    before = {name: np.asarray(x) for name, x in checkpoint.named_arrays(before).items()}
    assert {name for name, x in before.items() if not np.array_equal(x, after[name])} <= {
        *("step", "guard.consecutive_nonfinite", "guard.num_skipped", "guard.norms")
    }
    assert all(np.isfinite(x).all() for name, x in before.items() if x.dtype.kind == "f" and name != "guard.norms")


@pytest.mark.fault(15, "as many in a row as the guard bears")
def test_as_many_in_a_row_as_the_guard_bears_end_the_run(ended):
    folder, error = ended
    assert error.step == 42 and "3 consecutive steps, up to step 42, were not finite" in str(error)
    assert "jepax replay" in str(error) and len(str(error).splitlines()) <= 5
    assert max(checkpoint.list_steps(folder / "checkpoints")) == 41
    assert json.loads((folder / "health.json").read_text())["ended"].startswith("3 consecutive steps")


@pytest.mark.fault(15, "less patience than a run has used up already")
def test_a_run_that_goes_on_with_less_patience_ends_at_once(ended):
    config = run_of(GradGuardConfig(max_consecutive_nonfinite=1), large_gradient=(SPIKE,), **BAD)
    with pytest.raises(DivergedError, match="up to step 41") as end:
        train(config, ended[0].with_name("earlier"), allow_changes=["train.grad_guard.max_consecutive_nonfinite"])
    assert end.value.step == 41


@pytest.mark.fault(15, "the step that ended a run, again")
def test_its_last_step_can_be_replayed(ended, capsys):
    folder = ended[0] / "dumps" / "step_00000042"
    metrics = replay(folder)
    said = capsys.readouterr().out
    assert "state before it: all finite" in said and "bit-identical" in said
    assert "gradients: not finite in encoder." in said and "predictor" not in said
    assert int(metrics["guard/action"]) == Action.NONFINITE and np.isnan(metrics["optim/grad_norm"])
    assert configs.load(Config, folder / "config.yaml").train.compute_dtype == "float32"
    assert nan_dump.read_batch(folder).index.tolist() == list(range(42 * BATCH, 43 * BATCH))


@pytest.mark.fault(16, "a gradient times 1000: clipped")
def test_a_spike_is_clipped(ended):
    (told,) = happened(ended[0], "clipped")
    assert told["step"] == SPIKE and told["optim/grad_norm"] > told["guard/grad_norm_limit"] > 0
    (line,) = [line for line in logger.read_metrics(ended[0] / "metrics.jsonl") if line["step"] == 39]
    assert line["optim/grad_norm_max"] == pytest.approx(told["optim/grad_norm"])


def spike(action, batches=(40,)):
    return run_of(GradGuardConfig(max_consecutive_nonfinite=2, on_spike=action), large_gradient=batches)


@pytest.mark.fault(16, "a gradient times 1000: skipped, or let pass")
def test_a_spike_is_skipped_or_let_pass(tmp_path):
    skipped = train(spike("skip"), tmp_path / "skip")
    assert [line["step"] for line in happened(tmp_path / "skip", "skipped")] == [40]
    assert int(skipped.guard.num_skipped) == 1
    passed = train(spike("off"), tmp_path / "off")
    assert not happened(tmp_path / "off", "skipped", "clipped") and int(passed.guard.num_skipped) == 0
