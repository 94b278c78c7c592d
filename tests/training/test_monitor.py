"""Inspection of a run while it trains: logged values, reasons to stop, the best score, when an evaluation is due."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jepax.evals.features import NonFiniteFeaturesError
from jepax.io.events import Events, read_jsonl
from jepax.methods.ijepa import IJEPA
from jepax.training import monitor
from jepax.training.grad_guard import Action
from jepax.training.loop import update_best
from jepax.training.monitor import DivergedError, NonFiniteError, OnlineScores, StepInspector, log_values
from jepax.types import ImageBatch, UserError
from tests.contracts.shrink import shrunk

METHOD = object.__new__(IJEPA)  # nothing reads it
IMAGES = ImageBatch(jnp.zeros((2, 4, 4, 1), jnp.uint8), jnp.full((2, 2), 4), jnp.arange(2))


@pytest.fixture
def inspector(tmp_path):
    return StepInspector(shrunk("ijepa_fashion_mnist"), Events(tmp_path), lambda text: None, {})


def online_scores(evaluate, last_logged=-1):
    """Evaluations every 500 steps."""
    config = shrunk("ijepa_fashion_mnist")
    online = replace(config.eval.online, every_steps=500)
    return OnlineScores(replace(config, eval=replace(config.eval, online=online)), evaluate, last_logged)


def metrics(**others):
    usual = {
        "train/loss": 1.0,
        "optim/grad_norm": 1.0,
        "optim/update_norm": 1.0,
        "guard/grad_norm_limit": 10.0,
        "guard/action": Action.APPLIED,
    }
    return {name: jnp.asarray(value) for name, value in (usual | {"guard/consecutive_nonfinite": 0} | others).items()}


def test_rows_that_are_not_finite_are_not_diagnosed():
    rows = np.random.default_rng(0).normal(size=(8, 3))
    assert log_values(metrics(embeddings=rows))["health/embedding/rankme"] > 1
    rows[3, 1] = np.nan
    assert not [name for name in log_values(metrics(embeddings=rows)) if name.startswith("health/embedding")]


def test_the_best_is_that_of_one_metric():
    best, scores = {"val/probe_top1": 90.0}, {"val/probe_top1": 60.0, "val/knn_top1": 50.0}
    assert update_best(best, "val/knn_top1", scores) and not update_best(best, "val/knn_top1", scores)
    assert best == {"val/probe_top1": 90.0, "val/knn_top1": 50.0}
    assert update_best(best, "val/knn_top1", scores | {"val/knn_top1": 51.0}) and best["val/knn_top1"] == 51.0


@pytest.mark.parametrize("name", [None, "val/knn_top1"])
def test_without_the_metric_nothing_is_the_best(name):
    best = {}
    assert not update_best(best, name, {"val/probe_top1": 60.0}) and best == {}


def test_evaluations_continue_from_the_last_record_and_not_from_the_checkpoint():
    """Records every 300 steps, a checkpoint at 2000: what was due there is measured at the next record, as ever."""
    online = online_scores(lambda _: {"val/probe_top1": 60.0}, last_logged=1799)
    assert [online.is_due(step) for step in (2099, 2399, 2699)] == [True, False, True]


def test_no_evaluation_is_due_without_one():
    assert not online_scores(None).is_due(499)


@pytest.mark.parametrize(("error", "kind"), [(NonFiniteFeaturesError, DivergedError), (UserError, UserError)])
def test_only_features_that_are_not_finite_are_a_divergence(error, kind, monkeypatch):
    monkeypatch.setattr(monitor, "make_feature_extractor", lambda *_: None)

    def fail(_):
        raise error("not today")

    with pytest.raises(UserError, match="not today") as caught:
        online_scores(fail)(499, METHOD)
    assert type(caught.value) is kind


def test_a_step_is_inspected_when_the_next_one_comes(inspector):
    inspector.push(0, metrics(**{"train/loss": 5.0}), IMAGES)
    assert inspector.peaks == {}
    inspector.push(1, metrics(**{"train/loss": 7.0}), IMAGES)
    assert inspector.peaks["train/loss_max"] == 5.0
    inspector.flush()
    assert inspector.take_peaks()["train/loss_max"] == 7.0 and inspector.peaks == {}


@pytest.mark.parametrize("action", [Action.APPLIED, Action.CLIPPED])
def test_an_update_that_is_not_finite_ends_the_run(inspector, action):
    inspector.push(3, metrics(**{"guard/action": action, "optim/update_norm": np.nan}), IMAGES)
    with pytest.raises(DivergedError, match="update's norm of step 3 is nan"):
        inspector.flush()


def test_a_step_that_is_skipped_has_no_update(inspector, tmp_path):
    inspector.push(3, metrics(**{"guard/action": Action.SKIPPED, "optim/update_norm": np.nan}), IMAGES)
    inspector.flush()
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["examples"]) == ("skipped", 3, [0, 1])


def test_training_that_is_off_ends(inspector):
    inspector.push(3, metrics(**{"guard/action": Action.OFF}), IMAGES)
    with pytest.raises(NonFiniteError):
        inspector.flush()
