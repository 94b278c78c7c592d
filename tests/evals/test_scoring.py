"""Guesses never reward a diverged head, and the interval is the bootstrap's."""

import numpy as np
import pytest

from jepax.evals.checks import check_labels
from jepax.evals.scoring import NO_CLASS, accuracy, top1_accuracy, topk
from jepax.types import UserError


def test_guesses_go_by_value_and_then_by_class_number():
    values = np.array([[3.0, 2, 1, 0, -1, -2], [1.0] * 6, [0, 0, 5, 0, 5, 0]], np.float32)
    np.testing.assert_array_equal(topk(values), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [2, 4, 0, 1, 3]])


def test_few_classes_are_all_guessed():
    assert topk(np.eye(3, dtype=np.float32)).shape == (3, 3)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("classes", [4, 6])
def test_a_diverged_head_scores_nothing(classes, value):
    guesses = topk(np.full((4, classes), value, np.float32))
    assert (guesses == NO_CLASS).all()
    assert accuracy(guesses, np.array([0, 1, 2, 3])).top5 == 0.0


def test_one_value_that_is_not_finite_takes_only_its_own_class():
    np.testing.assert_array_equal(topk(np.array([[np.nan, 1.0, 2.0]], np.float32)), [[2, 1, NO_CLASS]])


def test_scores_are_shares_of_the_examples():
    guesses = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 4, 3, 2, 1], [9, 8, 7, 6, 5]], np.int32)
    found = accuracy(guesses, np.zeros(4, np.int32))
    assert (found.top1, found.top5) == (25.0, 50.0)
    assert top1_accuracy(guesses, np.zeros(4, np.int32)) == 25.0


@pytest.mark.parametrize(("count", "share"), [(200, 0.9), (1000, 0.5), (50, 0.02)])
def test_the_interval_is_the_bootstrap_percentile_interval(count, share):
    rng = np.random.default_rng(0)
    hit = np.arange(count) < share * count
    found = accuracy(np.where(hit, 1, 0).astype(np.int32)[:, None], np.ones(count, np.int32))
    drawn = [100 * hit[rng.integers(0, count, count)].mean() for _ in range(20_000)]
    np.testing.assert_allclose(found.ci95, np.quantile(drawn, [0.025, 0.975]), atol=1.01 * 100 / count)
    assert found.ci95[0] < found.top1 < found.ci95[1]


def test_a_perfect_score_has_no_width():
    assert accuracy(np.ones((10, 1), np.int32), np.ones(10, np.int32)).ci95 == (100.0, 100.0)


@pytest.mark.parametrize(("labels", "message"), [([0, 3], "0 to 3"), ([-1, 0], "-1 to 0"), ([], "no examples")])
def test_labels_out_of_range_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        check_labels(np.array(labels, np.int32), 3, "train")
