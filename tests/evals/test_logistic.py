"""Logistic regression reaches scikit-learn's optimum, its slope is the float64 one, and validation chooses."""

import jax.random as jr
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

import jepax.evals.logistic_solver as module
from jepax.evals.logistic import LogisticConfig, logistic
from jepax.evals.logistic_solver import fit_scaler, make_problem, regularization_path, solve
from jepax.evals.scoring import NO_CLASS, topk
from jepax.types import UserError
from tests.evals.made import Made, clusters, run

KEY = jr.key(0)


def fit(features, labels, classes, strength, start=None):
    problem, scaler, gram = make_problem(features, labels, classes, None)
    return solve(problem, scaler, gram, strength, start)


def standardized(features, split=None):
    """Layers side by side by the features' float64 statistics."""
    flat = [np.concatenate(one.astype(np.float64), axis=1) for one in (features, features if split is None else split)]
    deviation = flat[0].std(0)
    return (flat[1] - flat[0].mean(0)) / np.where(deviation > 0, deviation, 1)


def peer(features, labels, strength):
    """scikit-learn's to a tolerance far below float32."""
    model = LogisticRegression(C=1 / (len(labels) * strength), tol=1e-9, max_iter=5000, solver="newton-cg")
    return model.fit(standardized(features), labels)


def correlated(split, power=1.0):
    """The same split with features far from independent, and far from zero, as encoders' are."""
    rng = np.random.default_rng(9)
    dim = split.features.layers.shape[2]
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.arange(1, dim + 1)[:, None] ** -power
    return Made(split.features.layers @ turn @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + 3, split.labels)


@pytest.mark.parametrize("strength", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_optimum_is_scikit_learns(strength, layers):
    train, _, test = (correlated(split) for split in clusters(layers=layers, noise=2.5))
    model = fit(train.features.layers, train.labels, 7, strength)
    other = peer(train.features.layers, train.labels, strength)
    assert model.converged and 0 < model.iterations < 100
    np.testing.assert_allclose(model.weight.T, other.coef_, atol=1e-3)
    np.testing.assert_allclose(model.bias, other.intercept_, atol=2e-3)
    z = standardized(train.features.layers, test.features.layers)
    logits = model(test.features.layers)
    np.testing.assert_allclose(logits, other.decision_function(z), atol=5e-3)
    assert np.mean(logits.argmax(1) == other.predict(z)) > 0.996


@pytest.mark.parametrize("count", [256, 257, 300])
def test_the_slope_and_the_losses_are_the_float64_ones_padded_or_not(count):
    train, *_ = clusters(sizes=(count, 5, 5), offset=2)
    layers, labels = train.features.layers, train.labels
    problem, scaler, gram = make_problem(layers, labels, 7, None)
    assert len(problem.weight) == (256 if count == 256 else 512)
    z = np.concatenate([standardized(layers), np.ones((count, 1))], axis=1)
    theta = np.random.default_rng(0).normal(size=(17, 7)).astype(np.float32)
    losses, slope = module._cross_entropy(theta, problem)
    expected = -log_softmax(z @ theta, axis=1)[np.arange(count), labels]
    np.testing.assert_allclose(losses[:count], expected, rtol=2e-5, atol=2e-5)
    right = softmax(z @ theta, axis=1) - np.eye(7)[labels]
    np.testing.assert_allclose(slope, z.T @ right / count, atol=2e-6)
    np.testing.assert_allclose(gram, z.T @ z / count, atol=1e-5)
    alone = fit_scaler(layers)
    np.testing.assert_allclose(alone.mean, scaler.mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone.std, layers.astype(np.float64).std(1), rtol=1e-5)


def test_large_sets_are_not_padded(monkeypatch):
    monkeypatch.setattr(module, "PADDED_SIZES", (16, 256))
    train, *_ = clusters(sizes=(257, 5, 5))
    problem, *_ = make_problem(train.features.layers, train.labels, 7, None)
    assert problem.z.shape == (257, 17)


def test_sizes_share_programs():
    train, *_ = clusters(dim=11)
    before = module._cross_entropy._cache_size()
    for count in (30, 100, 256):
        fit(train.features.layers[:, :count], train.labels[:count], 7, 0.1)
    assert module._cross_entropy._cache_size() == before + 1


def test_a_path_goes_from_the_strongest_and_ends_where_lone_fits_do(monkeypatch):
    starts, real = [], module.solve
    monkeypatch.setattr(module, "solve", lambda *given: starts.append(given[4]) or real(*given))
    train, *_ = clusters(noise=2.5)
    layers, labels = train.features.layers, train.labels
    fits = list(regularization_path(layers, labels, 7, (1e-3, 1e-1, 1e-2)))
    assert [strength for strength, _ in fits] == [1e-1, 1e-2, 1e-3]
    assert starts[0] is None and starts[1] is fits[0][1] and starts[2] is fits[1][1]
    for strength, model in fits:
        assert model.converged
        np.testing.assert_allclose(model.weight, fit(layers, labels, 7, strength).weight, atol=1e-3)


def test_a_fit_may_start_from_another():
    train, *_ = clusters(noise=2.5)
    layers, labels = train.features.layers, train.labels
    cold = fit(layers, labels, 7, 1e-2)
    warm = fit(layers, labels, 7, 1e-2, cold)
    assert warm.iterations < cold.iterations / 3
    np.testing.assert_allclose(warm.weight, cold.weight, atol=2e-4)
    np.testing.assert_allclose(warm.bias, cold.bias, atol=2e-4)


def test_a_fit_that_stops_early_says_so(monkeypatch):
    train, *_ = clusters(noise=2.5)
    monkeypatch.setitem(module.LBFGS_OPTIONS, "maxiter", 2)
    model = fit(train.features.layers, train.labels, 7, 1e-3)
    assert not model.converged and model.iterations == 2


def test_correlated_features_take_few_iterations():
    train = correlated(clusters(dim=64, noise=2.5)[0], power=2.0)
    model = fit(train.features.layers, train.labels, 7, 1e-4)
    assert model.converged and model.iterations < 80


def test_a_constant_feature_changes_nothing():
    train, _, test = clusters()
    plain = fit(train.features.layers, train.labels, 7, 1e-2)
    wider = [np.concatenate([s.features.layers, np.full((1, len(s), 1), 1234.567)], axis=2) for s in (train, test)]
    model = fit(wider[0].astype(np.float32), train.labels, 7, 1e-2)
    assert np.all(model.weight[-1] == 0)
    np.testing.assert_allclose(model(wider[1].astype(np.float32)), plain(test.features.layers), atol=1e-3)


def test_the_bias_is_not_penalised():
    labels = np.repeat([0, 1, 2], [800, 150, 50]).astype(np.int32)
    model = fit(np.zeros((1, 1000, 3), np.float32), labels, 3, 10.0)
    np.testing.assert_allclose(softmax(model.bias), [0.8, 0.15, 0.05], atol=1e-4)


@pytest.mark.parametrize("missing", [0, 3])
def test_a_missing_class_is_never_named_and_the_others_are_fitted_without_it(missing):
    train, _, test = clusters(sizes=(200, 5, 50), noise=2.5)
    kept = train.labels != missing
    layers, labels = train.features.layers[:, kept], train.labels[kept]
    model, other = fit(layers, labels, 7, 1e-2), peer(layers, labels, 1e-2)
    assert model.converged and model.bias[missing] == -np.inf
    losses, slope = module._cross_entropy(np.zeros((17, 7), np.float32), make_problem(layers, labels, 7, None)[0])
    np.testing.assert_allclose(losses, np.log(6), rtol=1e-6)
    assert np.all(slope[:, missing] == 0)
    there = np.arange(7) != missing
    np.testing.assert_allclose(model.weight.T[there], other.coef_, atol=1e-3)
    guesses = topk(model(test.features.layers))
    assert missing not in guesses
    warm = fit(layers, labels, 7, 1e-2, model)
    assert warm.converged and warm.bias[missing] == -np.inf
    lone = fit(layers[:, labels == 1], labels[labels == 1], 7, 1e-2)
    assert (topk(lone(test.features.layers)) == [1, NO_CLASS, NO_CLASS, NO_CLASS, NO_CLASS]).all()


def test_validation_chooses_strength_and_layers():
    train, validation, test = clusters(sizes=(150, 211, 301), layers=4, noise=3.0)
    config = LogisticConfig((1e-4, 1.0, 1e-2))
    (fitted,) = run(logistic, train, validation, 7, config, key=KEY)
    places = [(name, strength) for name in config.layers for strength in (1.0, 1e-2, 1e-4)]
    assert [(one["layers"], one["strength"]) for one in fitted.trials] == places
    assert all(one["converged"] and one["iterations"] > 0 for one in fitted.trials)
    reached = [one["validation_top1"] for one in fitted.trials]
    assert len(set(reached)) > 3 and fitted.settings == fitted.trials[int(np.argmax(reached))]
    for name, strength, top1 in zip(*zip(*places, strict=True), reached, strict=True):
        part = slice(-1, None) if name == "last" else slice(None)
        z = standardized(train.features.layers[part], validation.features.layers[part])
        expected = 100 * peer(train.features.layers[part], train.labels, strength).score(z, validation.labels)
        assert top1 == pytest.approx(expected, abs=0.5)
    assert fitted.settings["layers"] == "last four"  # four layers with noise of their own tell more than one
    other = peer(train.features.layers, train.labels, fitted.settings["strength"])
    z = standardized(train.features.layers, test.features.layers)
    assert np.mean(fitted.predict(test.unlabeled())[:, 0] == other.predict(z)) > 0.996


def test_of_equals_the_strongest_penalty_on_the_last_layer_is_chosen():
    train, validation, _ = clusters(layers=2, noise=0.01)
    (fitted,) = run(logistic, train, validation, 7, LogisticConfig((1e-3, 1e-1)), key=KEY)
    assert {one["validation_top1"] for one in fitted.trials} == {100.0}
    assert (fitted.settings["layers"], fitted.settings["strength"]) == ("last", 1e-1)
    assert fitted.variant == "last, strength 0.1"


@pytest.mark.parametrize("layers", [("last",), ("last four",), ("last", "last four")])
def test_one_layer_is_fitted_once(layers):
    train, validation, _ = clusters(sizes=(100, 30, 5))
    (fitted,) = run(logistic, train, validation, 7, LogisticConfig((1e-1,), layers), key=KEY)
    assert [one["layers"] for one in fitted.trials] == ["last"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l2_penalties": ()}, r"l2_penalties=\(\)"),
        ({"l2_penalties": (1e-2, 0.0)}, r"l2_penalties=\(0.01, 0.0\)"),
        ({"layers": ()}, r"layers=\(\)"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LogisticConfig(**settings)


def test_bad_labels_are_refused():
    train, validation, _ = clusters(sizes=(30, 20, 5))
    with pytest.raises(UserError, match="train split"):
        run(logistic, train.unlabeled(), validation, 7, LogisticConfig(), key=KEY)
    with pytest.raises(UserError, match="validation split"):
        run(logistic, train, validation.unlabeled(), 7, LogisticConfig(), key=KEY)
