"""Evaluation during training: few held-out pictures, the same ones every time, and never the test split."""

import jax.random as jr
import numpy as np
import pytest

from jepax.data.sources import ArraySource
from jepax.evals.eval_dataset import random_subset
from jepax.evals.feature_extractor import ViTFeatures
from jepax.evals.online import OnlineConfig, OnlineEval
from jepax.nn import ViT, ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig

CROP = CropConfig(size=(8, 8), mean=(0.5,), std=(0.25,), eval_resize_ratio=1.0)


def source(count, seed, learnable=True):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    canvas = rng.integers(0, 130, (count, 8, 8, 1)) + 40 * labels[:, None, None, None] * learnable
    return ArraySource((8, 8, 1), tuple("abc"), labels, canvas.astype(np.uint8))


@pytest.fixture(scope="module")
def row():
    return ViTFeatures(ViT(ViTConfig(patch_size=4, in_channels=1, width=16, depth=2, num_heads=2), key=jr.key(0)), CROP)


def test_scores_are_those_of_held_out_pictures(row):
    config = OnlineConfig(train_images=200, validation_images=100)
    found = OnlineEval(config, source(300, 0), source(150, 1), 32)(row)
    assert set(found) == {"val/probe_top1", "val/knn_top1"}
    assert all(60 < value <= 100 for value in found.values())
    noise = OnlineEval(config, source(300, 0, learnable=False), source(150, 1, learnable=False), 32)(row)
    assert all(20 < value < 50 for value in noise.values())


def test_the_same_encoder_reads_the_same_every_time(row):
    online = OnlineEval(OnlineConfig(train_images=100, validation_images=50), source(300, 0), source(150, 1), 32)
    assert online(row) == online(row)


def test_some_pictures_are_drawn_over_the_whole_source():
    whole = source(300, 0)
    few = random_subset(whole, 50)
    assert len(few) == 50 and np.array_equal(few.rows, np.unique(few.rows)) and few.rows.max() > 200
    images, _ = few.load_batch(np.array([3, 0]))
    canvas, labels = images.canvas, images.label
    np.testing.assert_array_equal(canvas, whole.images[few.rows[[3, 0]]])
    np.testing.assert_array_equal(labels, whole.labels[few.rows[[3, 0]]])
    np.testing.assert_array_equal(random_subset(whole, 50).rows, few.rows)
    assert len(random_subset(whole, 1000)) == 300


def test_too_few_pictures_are_refused_before_training():
    with pytest.raises(UserError, match=r"eval\.online\.every_steps=500 needs 20 training images, and there are 7"):
        OnlineEval(OnlineConfig(), source(7, 0), source(7, 1), 32)


@pytest.mark.parametrize("change", [{"every_steps": -1}, {"train_images": 19}, {"validation_images": 0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        OnlineConfig(**change)
