"""Nearest neighbours equal scikit-learn's, and ties are broken the same way every time."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jepax.evals.features import Features
from jepax.evals.knn import KnnConfig, knn, knn_votes
from jepax.types import UserError


def made(seed=0, train=1003, test=301, dim=16, classes=7):
    """Overlapping clusters, so that neighbours disagree."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))

    def split(n):
        labels = rng.integers(0, classes, n).astype(np.int32)
        return Features((centres[labels] + 1.5 * rng.normal(size=(n, dim))).astype(np.float32)[None], labels)

    return split(train), split(test)


@pytest.mark.parametrize("neighbours", [1, 5, 20])
@pytest.mark.parametrize("chunk", [64, 1000])
def test_votes_and_score_equal_scikit_learns(neighbours, chunk):
    train, test = made()
    config = KnnConfig(neighbours=neighbours, chunk=chunk)
    peer = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    peer.fit(train.last.astype(np.float64), train.labels)
    votes = np.asarray(knn_votes(train.last, train.labels, test.last, classes=7, config=config))
    share = votes / votes.sum(1, keepdims=True)
    np.testing.assert_allclose(share, peer.predict_proba(test.last.astype(np.float64)), atol=2e-5)
    result = knn(train, test, 7, config)
    assert result.top1 == pytest.approx(100 * peer.score(test.last.astype(np.float64), test.labels))


def test_equally_near_neighbours_go_by_index():
    train = Features(np.ones((1, 200, 3), np.float32), np.repeat(np.array([2, 1, 0], np.int32), [3, 2, 195]))
    votes = knn_votes(train.last, train.labels, train.last, classes=3, config=KnnConfig(neighbours=4))
    assert (votes[:, 2] > votes[:, 1]).all() and (votes[:, 0] == 0).all()


def test_a_class_without_votes_is_never_a_hit():
    train = Features(np.eye(3, dtype=np.float32)[None], np.array([1, 1, 1], np.int32))
    test = Features(np.eye(3, dtype=np.float32)[None], np.array([0, 1, 2], np.int32))
    result = knn(train, test, 3, KnnConfig(neighbours=2))
    assert result.top1 == result.top5 == pytest.approx(100 / 3)


def test_rows_of_zeros_are_allowed():
    train = Features(np.zeros((1, 4, 3), np.float32), np.array([0, 0, 1, 1], np.int32))
    assert knn(train, train, 2, KnnConfig(neighbours=4)).top1 == 50.0


def test_more_neighbours_than_examples_are_refused():
    train, test = made(train=10)
    with pytest.raises(UserError, match="neighbours=20"):
        knn(train, test, 7)
    with pytest.raises(UserError, match="positive"):
        KnnConfig(temperature=0.0)
