"""The test split's labels cannot be read, and pictures that stand in two splits are found."""

import dataclasses

import jax.random as jr
import numpy as np
import pytest

from jepax.data import batches, iter_once
from jepax.data.sources import ArraySource
from jepax.evals.checks import check_labels
from jepax.evals.eval_dataset import NO_LABEL, EvalDataset, count_duplicates, digest, without_labels
from jepax.evals.feature_extractor import ViTFeatures
from jepax.nn import ViT, ViTConfig
from jepax.types import UserError
from jepax.views import CropConfig, center_crop

CROP = CropConfig(size=(8, 8), mean=(0.5,), std=(0.25,), eval_resize_ratio=1.0)


def source(n=37, seed=0):
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
    return ArraySource((8, 8, 1), tuple("abc"), rng.integers(0, 3, n).astype(np.int32), canvas)


@pytest.fixture(scope="module")
def row():
    return ViTFeatures(ViT(ViTConfig(patch_size=4, in_channels=1, width=16, depth=2, num_heads=2), key=jr.key(0)), CROP)


def test_an_unlabeled_source_has_the_pictures_and_no_label(row):
    open_, shut = source(), without_labels(source())
    split = EvalDataset(row, shut, 16)
    np.testing.assert_array_equal(split.features.layers, EvalDataset(row, open_, 16).features.layers)
    for labels in (split.labels, split.features.labels, shut.labels, shut.load_batch(np.arange(4))[0].label):
        assert (labels == NO_LABEL).all()
    for images, _ in split.images():
        assert (images.label == NO_LABEL).all()
    for images in split.shuffled(8, 3, 0):
        assert (images.label == NO_LABEL).all()
    with pytest.raises(UserError, match="labels of the test split"):
        check_labels(split.labels, 3, "test")


def test_features_are_those_of_the_encoder_and_embedded_once(row):
    split = EvalDataset(row, source(), 16)
    images, _ = next(iter_once(split.source, 37))
    tokens = row.encoder.intermediate_layers(center_crop(images, CROP), 4)
    np.testing.assert_allclose(split.features.layers, tokens.mean(2), atol=1e-5)
    assert split.features is split.features
    summed = EvalDataset(ViTFeatures(row.encoder, CROP, "sum"), source(), 16)
    np.testing.assert_allclose(summed.features.layers, tokens.sum(2), atol=1e-4)


def test_shuffled_batches_are_the_loaders(row):
    split = EvalDataset(row, source(), 16)
    ours = list(split.shuffled(8, 6, 3))
    theirs = list(batches(split.source, batch_size=8, steps=6, seed=3))
    assert len(ours) == 6
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.canvas, two.canvas)
        np.testing.assert_array_equal(one.label, two.label)


def test_pictures_in_two_splits_are_counted(row):
    train, test = source(seed=0), source(seed=1)
    planted = dataclasses.replace(test, images=np.concatenate([test.images[:30], train.images[:7]]))
    splits = {"train": EvalDataset(row, train, 16), "validation": EvalDataset(row, source(seed=2), 16)}
    splits["test"] = EvalDataset(row, without_labels(planted), 16)
    expected = {"train/validation": 0, "train/test": 7, "validation/test": 0}
    assert count_duplicates(splits) == expected  # read for it
    for split in splits.values():
        assert len(split.features) == 37 and len(split.digests) == 37
    assert count_duplicates(splits) == expected  # noted when they were embedded


def test_a_digest_tells_large_pictures_and_sizes_apart():
    images, _ = next(iter_once(source(), 37))
    large = np.random.default_rng(0).integers(0, 256, (3, 200, 200, 3)).astype(np.uint8)
    size = np.full((3, 2), 200, np.int32)
    made = dataclasses.replace(images, canvas=large, size=size, index=images.index[:3], label=None)
    assert len(set(digest(images))) == 37 and len(set(digest(made))) == 3
    cut = dataclasses.replace(made, size=size - 1)
    assert not np.isin(digest(cut), digest(made)).any()
