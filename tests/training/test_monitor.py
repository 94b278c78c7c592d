"""What is watched beside a run: what it logs, ends, and remembers."""

from contextlib import nullcontext
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jepax.evals.features import NonFiniteFeaturesError
from jepax.io.events import Events
from jepax.io.logger import Log
from jepax.methods.ijepa import IJEPA
from jepax.training import grad_guard, monitor
from jepax.training.monitor import DivergedError, Monitor, NonFiniteError, to_log_values
from jepax.types import ImageBatch, UserError
from tests.contracts.shrink import shrunk

METHOD = object.__new__(IJEPA)  # not looked into
IMAGES = ImageBatch(jnp.zeros((2, 4, 4, 1), jnp.uint8), jnp.full((2, 2), 4), jnp.arange(2))


class Lines(Log):
    """A log that keeps nothing."""

    def __init__(self, kept):
        self.previous_lines, self.said, self.steps = list(kept), [], 10_000
        self.print, self.pause_timer, self.seconds_per_step = self.said.append, nullcontext, lambda step: 1.0

    def write(self, step, values):
        return {"step": step, **values}


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Makes a monitor of a run with online evaluations every 500 steps, which score what `scores` holds."""

    def made(*, kept=(), note=None, best=None, scores=None):
        config = shrunk("ijepa_fashion_mnist")
        online = replace(config.eval.online, every=500)
        config = replace(
            config,
            eval=replace(config.eval, online=online),
            train=replace(config.train, save=replace(config.train.save, best=best)),
        )
        it = Monitor(config, tmp_path, Lines(kept), Events(tmp_path), note or {}, lambda step, line: None)
        it.online = lambda _: scores
        monkeypatch.setattr(monitor, "make_feature_extractor", lambda *_: None)
        return it

    return made


def metrics(**others):
    usual = {"loss": 1.0, "grad_norm": 1.0, "update_norm": 1.0, "grad_norm_limit": 10.0, "verdict": grad_guard.FINE}
    return {name: jnp.asarray(value) for name, value in (usual | {"in_a_row": 0} | others).items()}


def test_rows_that_are_not_finite_are_not_diagnosed():
    rows = np.random.default_rng(0).normal(size=(8, 3))
    assert to_log_values(metrics(embeddings=rows), 1.0, 8)["embedding_rank"] > 1
    rows[3, 1] = np.nan
    assert not [name for name in to_log_values(metrics(embeddings=rows), 1.0, 8) if name.startswith("embedding")]


def test_the_best_is_that_of_one_metric(watch):
    scores = {"probe_top1": 60.0, "knn_top1": 50.0}
    it = watch(best="knn_top1", note={"best": {"probe_top1": 90.0}}, scores=scores)
    assert it.line(499, metrics(), METHOD) and not it.line(999, metrics(), METHOD)
    note = it.note(True)
    assert note["best"] == {"probe_top1": 90.0, "knn_top1": 50.0} and note["score"] == {"knn_top1": 50.0}
    scores["knn_top1"] = 51.0
    assert it.line(1499, metrics(), METHOD) and note["best"]["knn_top1"] == 50.0


def test_without_a_metric_nothing_is_the_best(watch):
    assert not watch(scores={"probe_top1": 60.0}).line(499, metrics(), METHOD)


def test_evaluations_go_on_from_the_last_line_and_not_from_the_checkpoint(watch):
    """Lines every 300 steps, a checkpoint at 2000: what was due there is measured at the next line, as ever."""
    scores = {"probe_top1": 60.0}
    written = []
    it = watch(kept=[{"step": 1799, "loss": 1.0}], scores=scores)
    it.send = lambda step, line: written.append(line)
    it.line(2099, metrics(), METHOD)
    it.line(2399, metrics(), METHOD)
    assert ["probe_top1" in line for line in written] == [True, False]


def test_a_note_is_of_its_moment(watch):
    it = watch()
    it.took(0, metrics(loss=5.0), IMAGES)
    it.settle()
    note = it.note(False)
    it.took(1, metrics(loss=7.0), IMAGES)
    it.settle()
    assert note["peaks"]["loss_max"] == 5.0


@pytest.mark.parametrize(("error", "kind"), [(NonFiniteFeaturesError, DivergedError), (UserError, UserError)])
def test_only_features_that_are_not_finite_are_a_divergence(watch, error, kind):
    it = watch()

    def fail(_):
        raise error("not today")

    it.online = fail
    with pytest.raises(UserError, match="not today") as caught:
        it.line(499, metrics(), METHOD)
    assert type(caught.value) is kind


@pytest.mark.parametrize("verdict", [grad_guard.FINE, grad_guard.CLIPPED])
def test_an_update_that_is_not_finite_ends_the_run(watch, verdict):
    it = watch()
    it.took(3, metrics(verdict=verdict, update_norm=np.nan), IMAGES)
    with pytest.raises(DivergedError, match="update's norm of step 3 is nan"):
        it.settle()


def test_a_step_that_is_not_taken_has_no_update(watch):
    it = watch()
    it.took(3, metrics(verdict=grad_guard.SKIPPED, update_norm=np.nan), IMAGES)
    it.settle()


def test_training_that_is_off_ends(watch):
    it = watch()
    it.took(3, metrics(verdict=grad_guard.OFF), IMAGES)
    with pytest.raises(NonFiniteError):
        it.settle()
