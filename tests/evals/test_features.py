"""Extraction keeps every example once and in order; ranks never reward a diverged head."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.evals.features import Features, check_labels, extract, rank_of_label, scores
from jepax.types import Images, UserError


class Embed(eqx.Module):
    """Two layers: the first pixel, and twice that."""

    def __call__(self, images: Images):
        assert images.label is None, "labels must not reach an encoder"
        x = jnp.asarray(images.canvas, jnp.float32)[:, 0, 0, :1]
        return jnp.stack([x, 2 * x])


def batches(count=10, size=4, labelled=True):
    """A sweep as the loader makes it: the last batch is padded with copies of example 0."""
    for start in range(0, count, size):
        index = np.arange(start, start + size)
        index = np.where(index < count, index, 0).astype(np.int32)
        canvas = np.broadcast_to(index[:, None, None, None], (size, 2, 2, 1)).astype(np.uint8)
        label = (index % 3).astype(np.int32) if labelled else None
        yield Images(canvas, np.full((size, 2), 2, np.int32), index, label), min(size, count - start)


def test_every_example_once_and_in_order():
    seen = []
    features = extract(Embed(), batches(), lambda done, seconds: seen.append(done))
    assert features.layers.dtype == np.float32
    np.testing.assert_array_equal(features.layers[:, :, 0], [np.arange(10), 2 * np.arange(10)])
    np.testing.assert_array_equal(features.labels, np.arange(10) % 3)
    assert seen == [4, 8, 10]


def test_one_compilation_for_a_whole_sweep():
    traces = []

    def embed(images):
        traces.append(1)
        return Embed()(images)

    extract(embed, batches(count=11))
    assert len(traces) == 1


def test_last_and_concatenated_layers():
    layers = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    features = Features(layers, np.zeros(2, np.int32))
    np.testing.assert_array_equal(features.last, layers[4])
    np.testing.assert_array_equal(features.concatenated, np.concatenate(list(layers[1:]), axis=1))


def test_empty_and_unlabelled_sweeps_are_refused():
    with pytest.raises(UserError, match="no batches"):
        extract(Embed(), [])
    with pytest.raises(UserError, match="labels"):
        extract(Embed(), batches(labelled=False))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        Features(np.full((1, 2, 3), np.nan, np.float32), np.zeros(2, np.int32))


@pytest.mark.parametrize(("labels", "message"), [([0, 3], "0 to 3"), ([-1, 0], "-1 to 0"), ([], "no examples")])
def test_labels_out_of_range_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        check_labels(np.array(labels, np.int32), 3, "train")


def test_ranks_and_scores():
    values = np.array([[3.0, 2, 1, 0, -1, -2]] * 3 + [[1.0] * 6], np.float32)
    ranks = rank_of_label(values, np.array([0, 4, 5, 1]))
    np.testing.assert_array_equal(ranks, [0, 4, 5, 1])  # equal values: the smaller class number comes first
    assert scores(ranks) == scores(np.array([0, 4, 5, 1]))
    assert (scores(ranks).top1, scores(ranks).top5) == (25.0, 75.0)


@pytest.mark.parametrize("classes", [4, 6])
def test_a_diverged_head_scores_nothing(classes):
    ranks = rank_of_label(np.full((4, classes), np.nan, np.float32), np.array([0, 1, 2, 3]))
    assert (scores(ranks).top1, scores(ranks).top5) == (0.0, 0.0)
