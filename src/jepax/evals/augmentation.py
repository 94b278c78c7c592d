"""Random crops of images, drawn on the device from a key for each example, and their features."""

from dataclasses import replace
from typing import Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from jepax.distributed.sharding import shard_if_possible
from jepax.evals.eval_dataset import EvalDataset, random_subset
from jepax.evals.feature_extractor import FeatureExtractor, LayerFeatures, View
from jepax.types import Float, ImageBatch, PRNGKeyArray
from jepax.views import CropConfig, center_crop, random_resized_crop

TrainViews = Literal["center", "augmented"]


def augmented(images: ImageBatch, key: PRNGKeyArray, crop: CropConfig) -> View:
    """Random resized crops with flips. Example i draws from `fold_in(key, images.index[i])`.

    The index counts over all epochs, so an image is cropped differently in each epoch.
    """
    keys = jax.vmap(lambda index: jr.fold_in(key, index))(images.index)
    return random_resized_crop(images, keys, crop)


def train_view(views: TrainViews, images: ImageBatch, key: PRNGKeyArray, crop: CropConfig) -> View:
    """The center view, or a random crop."""
    return center_crop(images, crop) if views == "center" else augmented(images, key, crop)


class CropFeatures(eqx.Module):
    """Pooled features of random crops: `extract` calls it on batches of images."""

    extractor: FeatureExtractor
    key: PRNGKeyArray
    crop: CropConfig = eqx.field(static=True)

    def __call__(self, images: ImageBatch) -> LayerFeatures:
        return self.extractor.pooled(augmented(images, self.key, self.crop))


def crop_features(
    dataset: EvalDataset, images: int, crops: int, key: PRNGKeyArray
) -> Float[np.ndarray, "images crops dim"]:
    """The last layer's features of several random crops of each image of a random subset."""
    extractor, source = dataset.extractor, random_subset(dataset.source, images)
    subset, parts = EvalDataset(extractor, source, dataset.batch_size, **dataset.loading), []
    for batch, valid in subset.images():
        batch = shard_if_possible(replace(batch, label=None))
        functions = [eqx.filter_jit(CropFeatures(extractor, each, extractor.crop)) for each in jr.split(key, crops)]
        parts.append(np.stack([np.asarray(function(batch)[-1])[:valid] for function in functions], axis=1))
    return np.concatenate(parts)
