"""Nearest neighbors equal scikit-learn's, validation chooses k and temperature, and ties are always broken alike."""

import itertools

import jax.random as jr
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import jepax.evals.knn as module
from jepax.evals.knn import KnnConfig, KnnIndex, count_votes, knn, search
from jepax.evals.scoring import NO_CLASS, topk
from jepax.types import UserError
from tests.evals.made import Made, clusters, run

KEY = jr.key(0)


def peer(train, neighbors, temperature):
    """scikit-learn's in float64."""
    model = KNeighborsClassifier(neighbors, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    return model.fit(train.features.last.astype(np.float64), train.labels)


@pytest.mark.parametrize("temperature", [0.03, 0.2])
@pytest.mark.parametrize("neighbors", [1, 5, 20])
@pytest.mark.parametrize("chunk", [64, 1000])
def test_votes_and_guesses_equal_scikit_learns(neighbors, temperature, chunk):
    train, validation, test = clusters()
    other, queries = peer(train, neighbors, temperature), test.features.last.astype(np.float64)
    keys = KnnIndex.build(train.features.last, train.labels)
    found = [part for _, part in search(keys, test.features.last, 20, chunk)]
    sums = np.concatenate([count_votes(part, 7, neighbors, temperature) for part in found])
    sums = np.where(np.isfinite(sums), sums, 0)
    np.testing.assert_allclose(sums / sums.sum(1, keepdims=True), other.predict_proba(queries), atol=2e-5)
    (fitted,) = run(knn, train, validation, 7, KnnConfig((neighbors,), (temperature,), chunk), key=KEY)
    np.testing.assert_array_equal(fitted.predict(test.unlabeled())[:, 0], other.predict(queries))


def test_validation_chooses_the_first_of_the_best():
    train, validation, test = clusters(noise=3.0)
    config = KnnConfig((1, 5, 50, 5000), (0.03, 0.2), query_chunk=64)
    (fitted,) = run(knn, train, validation, 7, config, key=KEY)
    queries = validation.features.last.astype(np.float64)
    pairs = list(itertools.product((1, 5, 50), (0.03, 0.2)))
    expected = [100 * peer(train, *pair).score(queries, validation.labels) for pair in pairs]
    assert [(one["k"], one["temperature"]) for one in fitted.trials] == pairs
    np.testing.assert_allclose([one["validation_top1"] for one in fitted.trials], expected)
    assert len(set(expected)) > 2 and fitted.settings == fitted.trials[int(np.argmax(expected))]
    chosen = fitted.settings["k"], fitted.settings["temperature"]
    assert fitted.variant == f"k {chosen[0]}, temperature {chosen[1]:g}"
    reached = peer(train, *chosen).predict(test.features.last.astype(np.float64))
    np.testing.assert_array_equal(fitted.predict(test)[:, 0], reached)


def test_among_equals_the_first_is_chosen():
    train, validation, _ = clusters(noise=0.01)
    (fitted,) = run(knn, train, validation, 7, KnnConfig((5, 1), (0.2, 0.03)), key=KEY)
    assert {one["validation_top1"] for one in fitted.trials} == {100.0}
    assert (fitted.settings["k"], fitted.settings["temperature"]) == (5, 0.2)


def test_one_search_per_query_serves_every_setting(monkeypatch):
    calls, nearest = [], module._nearest_neighbors
    monkeypatch.setattr(module, "_nearest_neighbors", lambda *given: calls.append(given) or nearest(*given))
    train, validation, _ = clusters()
    run(knn, train, validation, 7, KnnConfig((1, 5, 20), query_chunk=64), key=KEY)
    assert len(calls) == 4 and {(id(c[0]), c[2].shape, c[4]) for c in calls} == {(id(calls[0][0]), (64, 16), 20)}


def test_equally_near_neighbours_go_by_number():
    train = Made(np.ones((200, 3)), np.repeat([2, 1, 0], [3, 2, 195]))
    found = next(search(KnnIndex.build(train.features.last, train.labels), train.features.last, 4, 256))[1]
    sums = count_votes(found, 3, 4, 0.07)
    assert (sums[:, 2] > sums[:, 1]).all() and (sums[:, 0] == -np.inf).all()


def test_equal_votes_go_to_the_lower_class():
    train = Made(np.ones((2, 3)), [1, 0])
    (fitted,) = run(knn, train, train, 3, KnnConfig((2,)), key=KEY)
    assert fitted.predict(train).tolist() == [[0, 1, NO_CLASS]] * 2


def test_a_class_without_votes_is_not_named():
    train, test = Made(np.eye(3), [1, 1, 1]), Made(np.eye(3), [0, 1, 2])
    (fitted,) = run(knn, train, test, 3, KnnConfig((2,)), key=KEY)
    assert fitted.predict(test).tolist() == [[1, NO_CLASS, NO_CLASS]] * 3
    assert fitted.settings["validation_top1"] == pytest.approx(100 / 3)


def test_rows_of_zeros_are_allowed_and_small_temperatures_do_not_overflow():
    train = Made(np.zeros((4, 3)), [0, 0, 1, 1])
    (fitted,) = run(knn, train, train, 2, KnnConfig((4,), (1e-4,)), key=KEY)
    assert fitted.settings["validation_top1"] == 50.0 and fitted.predict(train).tolist() == [[0, 1]] * 4
    train = Made(np.eye(3), [0, 1, 2])
    (fitted,) = run(knn, train, train, 3, KnnConfig((3,), (1e-4,)), key=KEY)
    assert fitted.settings["validation_top1"] == 100.0


def test_the_length_of_a_feature_does_not_matter():
    train, validation, test = clusters()
    scale = np.random.default_rng(0).uniform(0.1, 10, (1003, 1))
    (one,) = run(knn, train, validation, 7, KnnConfig((20,)), key=KEY)
    (other,) = run(knn, Made(train.features.last * scale, train.labels), validation, 7, KnnConfig((20,)), key=KEY)
    np.testing.assert_array_equal(one.predict(test), other.predict(test))


def test_only_the_last_layer_is_read():
    train, validation, test = clusters(layers=2)
    (fitted,) = run(knn, train, validation, 7, KnnConfig((5,), (0.07,)), key=KEY)
    expected = peer(train, 5, 0.07).predict(test.features.last.astype(np.float64))
    np.testing.assert_array_equal(fitted.predict(test)[:, 0], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": ()}, r"k=\(\)"),
        ({"k": (0, 5)}, r"k=\(0, 5\)"),
        ({"temperatures": ()}, r"temperatures=\(\)"),
        ({"temperatures": (0.07, 0.0)}, r"temperatures=\(0.07, 0.0\)"),
        ({"temperatures": (float("nan"),)}, r"temperatures=\(nan,\)"),
        ({"query_chunk": 0}, "query_chunk=0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        KnnConfig(**settings)


def test_more_neighbours_than_examples_and_bad_labels_are_refused():
    train, validation, _ = clusters(sizes=(10, 20, 5))
    with pytest.raises(UserError, match=r"k=\(20, 50\) are all more than the 10"):
        run(knn, train, validation, 7, KnnConfig((20, 50)), key=KEY)
    with pytest.raises(UserError, match="train split"):
        run(knn, train.unlabeled(), validation, 7, KnnConfig((5,)), key=KEY)
    with pytest.raises(UserError, match="validation split"):
        run(knn, train, validation.unlabeled(), 7, KnnConfig((5,)), key=KEY)


def test_best_guesses_are_ordered_by_vote():
    train, validation, test = clusters()
    (fitted,) = run(knn, train, validation, 7, KnnConfig((20,), (0.07,)), key=KEY)
    found = next(search(KnnIndex.build(train.features.last, train.labels), test.features.last, 20, 301))[1]
    np.testing.assert_array_equal(fitted.predict(test), topk(count_votes(found, 7, 20, 0.07)))
