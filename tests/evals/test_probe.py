"""Heads trained together equal heads trained alone, reach logistic regression, and are chosen without test labels."""

import contextlib
import dataclasses

import jax.random as jr
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jepax.data.sources import ArraySource
from jepax.evals.eval_dataset import EvalDataset, hide_labels
from jepax.evals.feature_extractor import ViTFeatures
from jepax.evals.probe import VISSL_PROBE, LinearProbeSweep, ProbeConfig, linear_probe
from jepax.evals.probe_sweep import train_cached_epoch
from jepax.evals.progress import ProgressReporter
from jepax.evals.scoring import compute_accuracy, top1_accuracy
from jepax.nn import ViT, ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig
from tests.evals.made import Made

CLASSES = 4
CONFIG = ProbeConfig(epochs=4, batch_size=100, learning_rates=(1e-3, 1e-2), weight_decays=(0.0, 0.1), controls=False)
LARS = dataclasses.replace(
    VISSL_PROBE, epochs=16, batch_size=100, learning_rates=(0.05, 0.5), views="centre", controls=False
)


def made(n, layers=2, dim=12, spread=2.0, seed=0):
    """Clusters that overlap, seen through features of unequal scale and offset; more so in the first layers."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    noise = spread * rng.normal(size=(layers, n, dim)) * np.linspace(2, 1, layers)[:, None, None]
    scale = np.linspace(0.2, 2, dim)
    return Made((centres[labels] + noise) * scale + 1, labels)


def trained(split, config):
    sweep = LinearProbeSweep(split, CLASSES, config, jr.key(3))
    for epoch in range(config.epochs):
        sweep.train_pass(epoch)
    return sweep


@pytest.mark.parametrize("config", [CONFIG, LARS], ids=["adamw", "lars"])
def test_heads_trained_together_equal_heads_trained_alone(config):
    split = made(1050)
    together = trained(split, config)
    for number, setting in enumerate(together.grid):
        only = {"learning_rates": (setting["learning_rate"],), "weight_decays": (setting["weight_decay"],)}
        alone = trained(split, dataclasses.replace(config, **only))
        place = 0 if setting["standardised"] else 1
        for name in ("last", "last four"):
            for ours, its in zip(together.state[name][0], alone.state[name][0], strict=True):
                assert np.abs(np.asarray(its[place])).max() > 0.01
                np.testing.assert_allclose(ours[number], its[place], atol=1e-4)


def test_the_candidates_are_the_same_with_controls_beside_them():
    split = made(1050)
    for name, (heads, _) in trained(split, CONFIG).state.items():
        beside = trained(split, dataclasses.replace(CONFIG, controls=True)).state[name][0]
        np.testing.assert_allclose(heads.weight, beside.weight, atol=1e-5)


def plain_lars(x, y, lr, wd, weight, batches, total):
    """LARS and momentum 0.9 in float64, term by term; the bias is neither decayed nor scaled."""
    bias, moved_w, moved_b = np.zeros(CLASSES), 0.0, 0.0
    for count, batch in enumerate(batches):
        rate = lr * 0.1 ** (count * 16 // total // 15)
        z = x[batch] @ weight + bias
        p = np.exp(z - z.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y[batch]]) / len(batch)
        grad = x[batch].T @ error + wd * weight
        trust = 1e-3 * np.linalg.norm(weight) / np.linalg.norm(grad)
        moved_w = 0.9 * moved_w + rate * trust * grad
        moved_b = 0.9 * moved_b + rate * error.sum(0)
        weight, bias = weight - moved_w, bias - moved_b
    return weight, bias


def test_lars_is_its_definition_in_float64():
    split = made(1050)
    sweep = LinearProbeSweep(split, CLASSES, LARS, jr.key(3))
    first = np.asarray(sweep.state["last"][0].weight[0], np.float64)
    assert 0.005 < first.std() < 0.02
    orders = [
        np.asarray(jr.permutation(jr.fold_in(sweep.key_order, e), 1050))[:1000].reshape(10, 100) for e in range(16)
    ]
    for epoch in range(16):
        sweep.train_pass(epoch)
    number = sweep.grid.index({"standardised": True, "learning_rate": 0.5, "weight_decay": 5e-4})
    x = split.features.last.astype(np.float64)
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    weight, bias = plain_lars(x, split.labels, 0.5 * 100 / 256, 5e-4, first, np.concatenate(orders), 160)
    heads = sweep.state["last"][0]
    np.testing.assert_allclose(heads.weight[number], weight, atol=1e-4)
    np.testing.assert_allclose(heads.bias[number], bias, atol=1e-4)


def test_accuracy_is_that_of_converged_logistic_regression():
    train, validation, test = (
        made(n, layers=1, spread=1.2, seed=seed) for n, seed in ((4000, 0), (2000, 1), (4000, 2))
    )
    config = ProbeConfig(epochs=30, learning_rates=(1e-3, 5e-3, 2e-2))  # rates that suit 4,000 examples
    (answer,) = linear_probe(train, validation, CLASSES, config, key=jr.key(0))
    result = compute_accuracy(answer.guess(test.withheld()), test.labels)
    peer = LogisticRegression(max_iter=1000).fit(train.features.last, train.labels)
    expected = 100 * peer.score(test.features.last, test.labels)
    assert 50 < expected < 90
    assert abs(result.top1 - expected) < 0.3
    assert result.top5 == 100.0


@pytest.fixture(scope="module")
def answers():
    return linear_probe(
        made(500, seed=0), made(200, seed=1), CLASSES, dataclasses.replace(CONFIG, controls=True), key=jr.key(0)
    )


def test_every_input_is_answered_and_controls_are_never_chosen(answers):
    names = ["last", "last four", "last four, projected", "last, expanded", "last, expanded and rectified"]
    assert [answer.name for answer in answers] == ["chosen", *names]
    chosen, *alone = answers
    assert len(chosen.tried) == 2 * 2 * 2 * 2 and {setting["layers"] for setting in chosen.tried} == set(names[:2])
    assert all({setting["layers"] for setting in answer.tried} == {answer.name} for answer in alone)
    for answer in answers:
        best = max(setting["validation_top1"] for setting in answer.tried)
        assert answer.settings["validation_top1"] == best
        assert answer.settings == next(setting for setting in answer.tried if setting["validation_top1"] == best)


def test_the_reported_head_is_the_chosen_one(answers):
    validation = made(200, seed=1)
    for answer in answers:
        guesses = answer.guess(validation.withheld())
        assert top1_accuracy(guesses, validation.labels) == pytest.approx(answer.settings["validation_top1"])


def test_a_random_projection_of_four_layers_cannot_beat_them_and_expansion_adds_nothing_linear():
    """Four noisy views of the same centres: concatenation averages the noise away, and only it can."""
    train, validation, test = (made(n, layers=4, dim=24, seed=s) for n, s in ((4000, 0), (2000, 1), (4000, 2)))
    config = ProbeConfig(epochs=20, learning_rates=(5e-3,), weight_decays=(0.0,))
    answers = linear_probe(train, validation, CLASSES, config, key=jr.key(0))
    found = {answer.name: top1_accuracy(answer.guess(test.withheld()), test.labels) for answer in answers}
    assert found["last four"] > found["last"] + 2
    assert found["last four"] > found["last four, projected"] + 2
    assert abs(found["last, expanded"] - found["last"]) < 1


def test_a_single_layer_has_one_answer():
    one = made(500, layers=1)
    (answer,) = linear_probe(one, one, CLASSES, dataclasses.replace(CONFIG, controls=True), key=jr.key(0))
    assert answer.name == "chosen" and {setting["layers"] for setting in answer.tried} == {"last"}


@pytest.mark.parametrize("value", [3.0, 0.1, -0.8102])
def test_constant_features_stay_constants(value):
    """In float32 the mean of a constant need not be it, and a deviation of rounding must not be divided by."""
    constant = Made(np.full((1, 5000, 12), value), np.tile(made(500).labels, 10))
    (answer,) = linear_probe(constant, constant, CLASSES, CONFIG, key=jr.key(0))
    assert 0 < answer.settings["validation_top1"] < 50
    moments = LinearProbeSweep(constant, CLASSES, CONFIG, jr.key(0)).basis.moments["last"]
    assert np.all(np.asarray(moments.std) >= 1e-3)


def test_the_sweep_compiles_once_for_a_shape():
    splits = made(500, seed=0), made(200, seed=1)
    linear_probe(*splits, CLASSES, CONFIG, key=jr.key(0))
    before = train_cached_epoch._cache_size()
    linear_probe(*splits, CLASSES, CONFIG, key=jr.key(1))
    assert train_cached_epoch._cache_size() == before > 0


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rates": ()},
        {"learning_rates": (-1.0,)},
        {"weight_decays": (-0.1,)},
        {"scale": (0.5, 2.0)},
        {"flip": 7.0},
        {"layers": ()},
        {"standardised": (True, True)},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        ProbeConfig(**change)


@pytest.mark.parametrize("empty", [0, 1])
def test_bad_splits_are_refused(empty):
    splits = [made(50), made(50)]
    splits[empty] = Made(np.zeros((2, 50, 12)), np.full(50, -1))
    with pytest.raises(UserError, match=("train", "validation")[empty]):
        linear_probe(*splits, CLASSES, CONFIG, key=jr.key(0))


def test_a_batch_larger_than_the_split_is_the_whole_split():
    few = made(20, layers=1)
    (answer,) = linear_probe(few, few, CLASSES, dataclasses.replace(CONFIG, batch_size=256), key=jr.key(0))
    assert answer.settings["validation_top1"] > 25


# With pictures.

CROP = CropConfig(size=(8, 8), scale=(0.5, 1.0), mean=(0.5,), std=(0.25,), centre_resize=1.0)


def pictures(n, seed):
    """Class c is of the c-th brightness, which every crop shows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    canvas = rng.integers(0, 100, (n, 8, 8, 1)) + 45 * labels[:, None, None, None]
    return ArraySource((8, 8, 1), tuple("abcd"), labels, canvas.astype(np.uint8))


@pytest.fixture(scope="module")
def row():
    return ViTFeatures(ViT(ViTConfig(patch_size=4, channels=1, width=16, depth=2, heads=2), key=jr.key(0)), CROP)


AUGMENTED = dataclasses.replace(
    VISSL_PROBE, epochs=8, batch_size=64, learning_rates=(100.0,), views="augmented", scale=(0.5, 1.0), flip=0.0
)


def test_augmented_crops_are_drawn_anew_in_each_pass(row):
    split = EvalDataset(row, pictures(200, 0), 64)
    sweep = LinearProbeSweep(split, CLASSES, AUGMENTED, jr.key(0))
    first, again, second = ([layers for layers, _ in sweep._crops(epoch)] for epoch in (0, 0, 1))
    assert len(first) == 3
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.isclose(np.sort(np.concatenate(first, axis=1)), np.sort(np.concatenate(second, axis=1))).all()
    assert "features" not in vars(split), "augmented training must not embed the centre crops"


def test_the_published_probe_learns_from_augmented_crops_and_reads_no_test_label(row):
    train, validation = EvalDataset(row, pictures(600, 0), 64), EvalDataset(row, pictures(200, 1), 64)
    source = pictures(200, 2)
    answers = linear_probe(train, validation, CLASSES, AUGMENTED, key=jr.key(0))
    found = top1_accuracy(answers[0].guess(EvalDataset(row, hide_labels(source), 64)), source.labels)
    assert found > 60


def test_crops_do_not_depend_on_the_pieces_that_the_encoder_takes(row):
    config = dataclasses.replace(AUGMENTED, batch_size=96)
    whole, pieces = (
        LinearProbeSweep(EvalDataset(row, pictures(200, 0), b), CLASSES, config, jr.key(0)) for b in (96, 48)
    )
    assert (whole.piece, pieces.piece, pieces.course.batch_size, pieces.course.steps) == (96, 48, 96, 2)
    for (one, its), (two, labels) in zip(whole._crops(1), pieces._crops(1), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
        np.testing.assert_array_equal(its, labels)
    odd = LinearProbeSweep(EvalDataset(row, pictures(200, 0), 40), CLASSES, config, jr.key(0))
    assert (odd.piece, odd.course.batch_size) == (40, 80)


def test_the_bar_counts_every_batch(row):
    counts = []

    class Telling(ProgressReporter):
        @contextlib.contextmanager
        def counting(self, what, total):
            yield lambda count: counts.append((what, count, total))

    splits = EvalDataset(row, pictures(200, 0), 64), EvalDataset(row, pictures(100, 1), 64)
    linear_probe(*splits, CLASSES, AUGMENTED, key=jr.key(0), say=Telling(print))
    assert counts == [("linear probe", count, 27) for count in range(1, 28)]
    counts.clear()
    linear_probe(made(500), made(200), CLASSES, CONFIG, key=jr.key(0), say=Telling(print))
    assert counts == [("linear probe", count, 20) for count in (5, 10, 15, 20)]


def test_the_statistics_of_augmented_crops_are_those_of_a_whole_pass(row):
    sweep = LinearProbeSweep(EvalDataset(row, pictures(200, 0), 64), CLASSES, AUGMENTED, jr.key(0))
    seen = np.concatenate([layers for layers, _ in sweep._crops(0)], axis=1)[-1].astype(np.float64)
    np.testing.assert_allclose(sweep.basis.moments["last"].mean, seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sweep.basis.moments["last"].std, np.sqrt(seen.var(0) + 1e-6), rtol=1e-4)
