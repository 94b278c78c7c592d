"""The floors: pixels as they are or smaller, and the most frequent classes."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.transform import resize

from jepax.evals.baselines import PixelFeatures, class_counts, downscale
from jepax.evals.scoring import accuracy, topk
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig

PLAIN = CropConfig(size=(28, 28), mean=(0.0,), std=(1.0,), eval_resize_ratio=1.0)


def test_small_views_are_only_flattened():
    canvas = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28, 1)
    images = ImageBatch(canvas, np.full((3, 2), 28, np.int32), np.arange(3, dtype=np.int32))
    row = PixelFeatures(PLAIN, 7)
    features = row(images)
    assert features.shape == (1, 3, 784)
    np.testing.assert_allclose(features[0], canvas.reshape(3, -1) / 255, atol=1e-6)
    tokens = row.tokens(jnp.asarray(canvas, jnp.float32))
    assert tokens.shape == (3, 16, 49)
    np.testing.assert_array_equal(tokens[1, 5], canvas[1, 7:14, 7:14].reshape(-1))


@pytest.mark.parametrize(("shape", "expected"), [((224, 224), (32, 32)), ((64, 33), (32, 16)), ((300, 4), (32, 1))])
def test_large_views_are_scaled_down(shape, expected):
    out = downscale(jnp.ones((2, *shape, 3)))
    assert out.shape == (2, *expected, 3)
    np.testing.assert_allclose(out, 1.0, rtol=1e-5)


def test_scaling_down_is_antialiased():
    row, column = np.mgrid[:96, :96]
    stripes = ((row + column) % 2).astype(np.float32)
    smooth = np.sin(row / 20) * np.cos(column / 15)
    picture = (stripes + smooth).astype(np.float32)
    out = downscale(jnp.asarray(picture)[None, :, :, None])[0, :, :, 0]
    expected = resize(smooth + 0.5, (32, 32), order=1, anti_aliasing=True)
    np.testing.assert_allclose(out[1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.07)


def guessed(train, classes, count):
    return np.tile(topk(class_counts(train, classes)[None]), (count, 1))


def test_majority_is_chosen_on_train_and_read_on_test():
    train = np.repeat(np.arange(7), [1, 9, 2, 8, 3, 7, 4])
    test = np.array([1, 1, 3, 0, 2, 4, 5, 6])
    result = accuracy(guessed(train, 7, 8), test)
    assert result.top1 == 25.0
    assert result.top5 == 100 * 6 / 8  # classes 1, 3, 5, 6, 4


def test_equally_frequent_classes_go_by_number():
    result = accuracy(guessed(np.array([2, 2, 1, 1, 0]), 3, 3), np.array([1, 1, 2]))
    assert result.top1 == pytest.approx(100 * 2 / 3)
    assert result.top5 == 100.0


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no examples"):
        class_counts(np.zeros(0, np.int32), 3)
