"""Heads trained together equal heads trained alone, reach logistic regression, and are chosen without test labels."""

import contextlib
import dataclasses

import jax.random as jr
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import jepax.evals.linear as module
from jepax.data.sources import ArraySource
from jepax.evals.eval_dataset import EvalDataset, without_labels
from jepax.evals.feature_extractor import ViTFeatures
from jepax.evals.head_training import train_cached_epoch
from jepax.evals.linear import PUBLISHED, LinearConfig, LinearProbeSweep, linear
from jepax.evals.linear_heads import CONTROLS
from jepax.evals.progress import Progress
from jepax.evals.scoring import ProtocolData, accuracy, top1_accuracy
from jepax.nn import ViT, ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig
from tests.evals.made import Made, run

CLASSES = 4
CONFIG = LinearConfig(
    epochs=4, batch_size=100, learning_rates=(1e-3, 1e-2), weight_decays=(0.0, 0.1), width_controls=False
)
LARS = dataclasses.replace(
    PUBLISHED, epochs=16, batch_size=100, learning_rates=(0.05, 0.5), train_views="center", width_controls=False
)


def made(n, layers=2, dim=12, spread=2.0, seed=0):
    """Clusters that overlap, seen through features of unequal scale and offset; more so in the first layers."""
    centers = np.random.default_rng(7).normal(size=(CLASSES, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    noise = spread * rng.normal(size=(layers, n, dim)) * np.linspace(2, 1, layers)[:, None, None]
    scale = np.linspace(0.2, 2, dim)
    return Made((centers[labels] + noise) * scale + 1, labels)


def trained(split, config):
    sweep = LinearProbeSweep(ProtocolData(split, split, CLASSES, jr.key(3)), config)
    for epoch in range(config.epochs):
        sweep.train_epoch(epoch)
    return sweep


@pytest.mark.parametrize("config", [CONFIG, LARS], ids=["adamw", "lars"])
def test_heads_trained_together_equal_heads_trained_alone(config):
    split = made(1050)
    together = trained(split, config)
    for number, setting in enumerate(together.grid):
        only = {"learning_rates": (setting["learning_rate"],), "weight_decays": (setting["weight_decay"],)}
        alone = trained(split, dataclasses.replace(config, **only))
        place = 0 if setting["standardize"] else 1
        for name in ("last", "last four"):
            for ours, its in zip(together.state.params[name], alone.state.params[name], strict=True):
                assert np.abs(np.asarray(its[place])).max() > 0.01
                np.testing.assert_allclose(ours[number], its[place], atol=1e-4)


def test_the_candidates_are_the_same_with_controls_beside_them():
    split = made(1050)
    for name, heads in trained(split, CONFIG).state.params.items():
        beside = trained(split, dataclasses.replace(CONFIG, width_controls=True)).state.params[name]
        np.testing.assert_allclose(heads.weight, beside.weight, atol=1e-5)


def test_projections_are_the_same_from_the_cache_and_in_every_step(monkeypatch):
    split, config = made(1050), dataclasses.replace(CONFIG, width_controls=True, epochs=1)
    cached = trained(split, config)
    assert set(cached.cached) == set(CONTROLS)
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 4 * 1050 * (12 + 2 * 24) - 1)
    computed = trained(split, config)
    assert computed.cached == {}
    for name in CONTROLS:
        weight = cached.state.params[name].weight
        assert np.abs(weight).max() > 0.001
        np.testing.assert_allclose(weight, computed.state.params[name].weight, atol=1e-5)


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
    sweep = LinearProbeSweep(ProtocolData(split, split, CLASSES, jr.key(3)), LARS)
    first = np.asarray(sweep.state.params["last"].weight[0], np.float64)
    assert 0.005 < first.std() < 0.02
    orders = [
        np.asarray(jr.permutation(jr.fold_in(sweep.key_order, e), 1050))[:1000].reshape(10, 100) for e in range(16)
    ]
    for epoch in range(16):
        sweep.train_epoch(epoch)
    number = sweep.grid.index({"standardize": True, "learning_rate": 0.5, "weight_decay": 5e-4})
    x = split.features.last.astype(np.float64)
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    weight, bias = plain_lars(x, split.labels, 0.5 * 100 / 256, 5e-4, first, np.concatenate(orders), 160)
    heads = sweep.state.params["last"]
    np.testing.assert_allclose(heads.weight[number], weight, atol=1e-4)
    np.testing.assert_allclose(heads.bias[number], bias, atol=1e-4)


def test_accuracy_is_that_of_converged_logistic_regression():
    train, validation, test = (
        made(n, layers=1, spread=1.2, seed=seed) for n, seed in ((4000, 0), (2000, 1), (4000, 2))
    )
    config = LinearConfig(epochs=30, learning_rates=(1e-3, 5e-3, 2e-2))  # rates that suit 4,000 examples
    (answer,) = run(linear, train, validation, CLASSES, config, key=jr.key(0))
    result = accuracy(answer.predict(test.unlabeled()), test.labels)
    peer = LogisticRegression(max_iter=1000).fit(train.features.last, train.labels)
    expected = 100 * peer.score(test.features.last, test.labels)
    assert 50 < expected < 90
    assert abs(result.top1 - expected) < 0.3
    assert result.top5 == 100.0


@pytest.fixture(scope="module")
def answers():
    return run(
        linear,
        made(500, seed=0),
        made(200, seed=1),
        CLASSES,
        dataclasses.replace(CONFIG, width_controls=True),
        key=jr.key(0),
    )


def test_every_input_is_answered_and_controls_are_never_chosen(answers):
    names = ["last", "last four", "last four, projected", "last, expanded", "last, expanded and rectified"]
    assert [answer.name for answer in answers] == ["best", *names]
    chosen, *alone = answers
    assert len(chosen.trials) == 2 * 2 * 2 * 2 and {setting["layers"] for setting in chosen.trials} == set(names[:2])
    assert all({setting["layers"] for setting in answer.trials} == {answer.name} for answer in alone)
    for answer in answers:
        best = max(setting["validation_top1"] for setting in answer.trials)
        assert answer.settings["validation_top1"] == best
        assert answer.settings == next(setting for setting in answer.trials if setting["validation_top1"] == best)


def test_the_reported_head_is_the_chosen_one(answers):
    validation = made(200, seed=1)
    for answer in answers:
        guesses = answer.predict(validation.unlabeled())
        assert top1_accuracy(guesses, validation.labels) == pytest.approx(answer.settings["validation_top1"])


def test_a_random_projection_of_four_layers_cannot_beat_them_and_expansion_adds_nothing_linear():
    """Four noisy views of the same centers: concatenation averages the noise away, and only it can."""
    train, validation, test = (made(n, layers=4, dim=24, seed=s) for n, s in ((4000, 0), (2000, 1), (4000, 2)))
    config = LinearConfig(epochs=20, learning_rates=(5e-3,), weight_decays=(0.0,))
    answers = run(linear, train, validation, CLASSES, config, key=jr.key(0))
    found = {answer.name: top1_accuracy(answer.predict(test.unlabeled()), test.labels) for answer in answers}
    assert found["last four"] > found["last"] + 2
    assert found["last four"] > found["last four, projected"] + 2
    assert abs(found["last, expanded"] - found["last"]) < 1


def test_a_single_layer_has_one_answer():
    one = made(500, layers=1)
    (answer,) = run(linear, one, one, CLASSES, dataclasses.replace(CONFIG, width_controls=True), key=jr.key(0))
    assert answer.name == "best" and {setting["layers"] for setting in answer.trials} == {"last"}


@pytest.mark.parametrize("value", [3.0, 0.1, -0.8102])
def test_constant_features_stay_constants(value):
    """In float32 the mean of a constant need not be it, and a deviation of rounding must not be divided by."""
    constant = Made(np.full((1, 5000, 12), value), np.tile(made(500).labels, 10))
    (answer,) = run(linear, constant, constant, CLASSES, CONFIG, key=jr.key(0))
    assert 0 < answer.settings["validation_top1"] < 50
    moments = LinearProbeSweep(ProtocolData(constant, constant, CLASSES, jr.key(0)), CONFIG).task.moments["last"]
    assert np.all(np.asarray(moments.std) >= 1e-3)


def test_the_sweep_compiles_once_for_a_shape():
    splits = made(500, seed=0), made(200, seed=1)
    run(linear, *splits, CLASSES, CONFIG, key=jr.key(0))
    before = train_cached_epoch._cache_size()
    run(linear, *splits, CLASSES, CONFIG, key=jr.key(1))
    assert train_cached_epoch._cache_size() == before > 0


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rates": ()},
        {"learning_rates": (-1.0,)},
        {"weight_decays": (-0.1,)},
        {"crop_scale": (0.5, 2.0)},
        {"hflip_prob": 7.0},
        {"layers": ()},
        {"standardize": (True, True)},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        LinearConfig(**change)


@pytest.mark.parametrize("empty", [0, 1])
def test_bad_splits_are_refused(empty):
    splits = [made(50), made(50)]
    splits[empty] = Made(np.zeros((2, 50, 12)), np.full(50, -1))
    with pytest.raises(UserError, match=("train", "validation")[empty]):
        run(linear, *splits, CLASSES, CONFIG, key=jr.key(0))


def test_a_batch_larger_than_the_split_is_the_whole_split():
    few = made(20, layers=1)
    (answer,) = run(linear, few, few, CLASSES, dataclasses.replace(CONFIG, batch_size=256), key=jr.key(0))
    assert answer.settings["validation_top1"] > 25


# With pictures.

CROP = CropConfig(size=(8, 8), scale=(0.5, 1.0), mean=(0.5,), std=(0.25,), eval_resize_ratio=1.0)


def pictures(n, seed):
    """Class c is of the c-th brightness, which every crop shows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    canvas = rng.integers(0, 100, (n, 8, 8, 1)) + 45 * labels[:, None, None, None]
    return ArraySource((8, 8, 1), tuple("abcd"), labels, canvas.astype(np.uint8))


@pytest.fixture(scope="module")
def row():
    return ViTFeatures(ViT(ViTConfig(patch_size=4, in_channels=1, width=16, depth=2, num_heads=2), key=jr.key(0)), CROP)


AUGMENTED = dataclasses.replace(
    PUBLISHED,
    epochs=8,
    batch_size=64,
    learning_rates=(100.0,),
    train_views="augmented",
    crop_scale=(0.5, 1.0),
    hflip_prob=0.0,
)


def sweep_of(dataset, config=AUGMENTED):
    return LinearProbeSweep(ProtocolData(dataset, dataset, CLASSES, jr.key(0)), config)


def test_augmented_crops_are_drawn_anew_in_each_epoch(row):
    split = EvalDataset(row, pictures(200, 0), 64)
    sweep = sweep_of(split)
    first, again, second = (sweep._embed(epoch).layers for epoch in (0, 0, 1))
    assert first.shape == (2, 200, 16)
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - second).max(axis=(0, 2)) > 1e-4).mean() > 0.9  # some crops are the image both times
    assert "features" not in vars(split), "augmented training must not embed the center crops"


def test_each_epoch_trains_on_its_own_crops(row):
    sweep = sweep_of(EvalDataset(row, pictures(200, 0), 64))
    for epoch in (0, 1):
        sweep.train_epoch(epoch)
        np.testing.assert_array_equal(sweep.features.layers, sweep._embed(epoch).layers)
        np.testing.assert_array_equal(sweep.features.labels, sweep.dataset.labels)


def test_the_published_probe_learns_from_augmented_crops_and_reads_no_test_label(row):
    train, validation = EvalDataset(row, pictures(600, 0), 64), EvalDataset(row, pictures(200, 1), 64)
    source = pictures(200, 2)
    answers = run(linear, train, validation, CLASSES, AUGMENTED, key=jr.key(0))
    found = top1_accuracy(answers[0].predict(EvalDataset(row, without_labels(source), 64)), source.labels)
    assert found > 60


def test_crops_do_not_depend_on_the_batch_that_the_encoder_takes(row):
    whole, parts = (sweep_of(EvalDataset(row, pictures(200, 0), size)) for size in (96, 48))
    np.testing.assert_allclose(whole._embed(1).layers, parts._embed(1).layers, atol=1e-5)
    assert whole.task.schedule == parts.task.schedule and whole.task.schedule.batch_size == 64


def test_the_bar_counts_every_example(row):
    counts = []

    class Telling(Progress):
        @contextlib.contextmanager
        def bar(self, description, total):
            yield lambda count: counts.append((description, count, total))

    splits = EvalDataset(row, pictures(200, 0), 64), EvalDataset(row, pictures(100, 1), 64)
    run(linear, *splits, CLASSES, AUGMENTED, progress=Telling(print))
    assert counts[:5] == [("linear probe", count, 1600) for count in (64, 128, 192, 200, 200)]
    assert [count for _, count, _ in counts] == sorted(count for _, count, _ in counts)
    assert counts[-1] == ("linear probe", 1600, 1600)
    counts.clear()
    run(linear, made(500), made(200), CLASSES, CONFIG, progress=Telling(print))
    assert counts == [("linear probe", count, 2000) for count in (500, 1000, 1500, 2000)]


def test_the_statistics_of_augmented_crops_are_those_of_the_first_epoch(row):
    sweep = sweep_of(EvalDataset(row, pictures(200, 0), 64))
    seen = sweep._embed(0).last.astype(np.float64)
    np.testing.assert_allclose(sweep.task.moments["last"].mean, seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sweep.task.moments["last"].std, np.sqrt(seen.var(0) + 1e-6), rtol=1e-4)
