"""Heads trained together equal heads trained alone, reach logistic regression, and are chosen without test labels."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jepax.evals.features import Features
from jepax.evals.probe import Heads, ProbeConfig, frame, head_logits, linear_probe, standardise, train_heads
from jepax.types import UserError

CLASSES = 4
CONFIG = ProbeConfig(epochs=4, batch_size=100, learning_rates=(1e-3, 1e-2), weight_decays=(0.0, 0.1))


def made(n, layers=2, dim=12, spread=2.0, seed=0):
    """Clusters that overlap, seen through features of unequal scale and offset; more so in the first layers."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    noise = spread * rng.normal(size=(layers, n, dim)) * np.linspace(2, 1, layers)[:, None, None]
    scale = np.linspace(0.2, 2, dim)
    return Features(((centres[labels] + noise) * scale + 1).astype(np.float32), labels)


def trained(features, standardised, rates, decays):
    basis = frame(features.last, np.float32(standardised))
    z = standardise(basis, features.last)
    arrays = (z, features.labels, basis, np.float32(rates), np.float32(decays))
    return train_heads(*arrays, classes=CLASSES, config=CONFIG, key=jr.key(3))


def test_heads_trained_together_equal_heads_trained_alone():
    features = made(1050)
    flags, rates, decays = [1, 1, 0, 0], [1e-3, 2e-2, 1e-3, 2e-2], [0.1, 0.0, 0.0, 0.1]
    together = trained(features, flags, rates, decays)
    for head in range(4):
        one = slice(head, head + 1)
        alone = trained(features, flags[one], rates[one], decays[one])
        np.testing.assert_allclose(together.weight[:, head], alone.weight[:, 0], atol=1e-4)
        np.testing.assert_allclose(together.bias[head], alone.bias[0], atol=1e-4)


def test_one_standardised_matrix_serves_both_kinds_of_head():
    x = made(50).last
    basis = frame(x, np.float32([1, 0]))
    weight = jr.normal(jr.key(0), (12, 2, CLASSES))
    bias = jr.normal(jr.key(1), (2, CLASSES))
    logits = head_logits(Heads(weight, bias), basis, standardise(basis, x))
    scaled = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(logits[:, 0], scaled @ weight[:, 0] + bias[0], atol=1e-4)
    np.testing.assert_allclose(logits[:, 1], x @ weight[:, 1] + bias[1], atol=1e-4)


def test_accuracy_is_that_of_converged_logistic_regression():
    train, validation, test = (
        made(n, layers=1, spread=1.2, seed=seed) for n, seed in ((4000, 0), (2000, 1), (4000, 2))
    )
    config = ProbeConfig(epochs=30, learning_rates=(1e-3, 5e-3, 2e-2))  # rates that suit 4,000 examples
    result = linear_probe(train, validation, test, CLASSES, config, key=jr.key(0))
    peer = LogisticRegression(max_iter=1000).fit(train.last, train.labels)
    expected = 100 * peer.score(test.last, test.labels)
    assert 50 < expected < 90
    assert abs(result.test.top1 - expected) < 0.3
    assert result.test.top5 == 100.0


@pytest.fixture(scope="module")
def splits():
    return made(500, seed=0), made(200, seed=1), made(300, seed=2)


def test_the_choice_does_not_see_the_test_labels(splits):
    train, validation, test = splits
    honest = linear_probe(train, validation, test, CLASSES, CONFIG, key=jr.key(0))
    permuted = np.random.default_rng(0).permutation(test.labels)
    planted = linear_probe(
        train, validation, dataclasses.replace(test, labels=permuted), CLASSES, CONFIG, key=jr.key(0)
    )
    assert planted.chosen == honest.chosen
    assert planted.grid == honest.grid
    assert planted.test.top1 < honest.test.top1


def test_the_best_of_the_whole_grid_on_validation_is_chosen(splits):
    result = linear_probe(*splits, CLASSES, CONFIG, key=jr.key(0))
    assert len(result.grid) == 2 * 2 * 2 * 2
    assert len(set(result.grid)) == len({dataclasses.replace(v, validation_top1=0.0) for v in result.grid}) == 16
    assert result.chosen in result.grid
    assert result.chosen.validation_top1 == max(variant.validation_top1 for variant in result.grid)


def test_the_reported_head_is_the_chosen_one(splits):
    train, validation, _ = splits
    result = linear_probe(train, validation, validation, CLASSES, CONFIG, key=jr.key(0))
    assert result.test.top1 == pytest.approx(result.chosen.validation_top1)


def test_a_single_layer_is_not_swept_twice():
    one = made(500, layers=1)
    result = linear_probe(one, one, one, CLASSES, CONFIG, key=jr.key(0))
    assert {variant.layers for variant in result.grid} == {"last"}


def test_constant_features_give_finite_heads():
    constant = Features(np.full((1, 500, 12), 3.0, np.float32), made(500).labels)
    result = linear_probe(constant, constant, constant, CLASSES, CONFIG, key=jr.key(0))
    assert 0 < result.test.top1 < 50


def test_the_sweep_compiles_once_for_a_shape(splits):
    linear_probe(*splits, CLASSES, CONFIG, key=jr.key(0))
    before = train_heads._cache_size()
    linear_probe(*splits, CLASSES, CONFIG, key=jr.key(1))
    assert train_heads._cache_size() == before


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"batch_size": 0}, {"learning_rates": ()}, {"learning_rates": (-1.0,)}, {"weight_decays": (-0.1,)}],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        ProbeConfig(**change)


def test_a_batch_larger_than_the_split_is_the_whole_split():
    few = made(20, layers=1)
    result = linear_probe(few, few, few, CLASSES, dataclasses.replace(CONFIG, batch_size=256), key=jr.key(0))
    assert np.isfinite(result.test.top1)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x)), [v.validation_top1 for v in result.grid]))
