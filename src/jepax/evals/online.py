"""Evaluation during training: a logistic probe and nearest neighbors on a few held-out images."""

from dataclasses import dataclass

import jax.random as jr

from jepax.data import Source
from jepax.evals.eval_dataset import EvalDataset, random_subset
from jepax.evals.feature_extractor import FeatureExtractor
from jepax.evals.knn import KnnConfig, knn
from jepax.evals.logistic import LogisticConfig, logistic
from jepax.evals.scoring import ProtocolData
from jepax.types import UserError

ONLINE_KNN = KnnConfig(k=(20,), temperatures=(0.07,))
ONLINE_LOGISTIC = LogisticConfig(l2_penalties=(1e-3,), layers=("last",))
"""Nothing is chosen, so the scores of one run are comparable from step to step."""


@dataclass(frozen=True)
class OnlineConfig:
    """Interval and number of images. The test split is never opened."""

    every_steps: int = 500
    """Steps between evaluations, each at the next logging step; 0: none."""
    train_images: int = 2048
    """Images of the training split that the probe is fitted on and that are neighbors."""
    validation_images: int = 1024
    """Images of the validation split that are scored."""

    def __post_init__(self):
        if self.every_steps < 0:
            raise UserError(f"online.every_steps={self.every_steps} must not be negative; 0 turns it off")
        for name, least in (("train_images", ONLINE_KNN.k[0]), ("validation_images", 1)):
            if getattr(self, name) < least:
                raise UserError(f"online.{name}={getattr(self, name)} must be at least {least}")


class OnlineEval:
    """Scores encoders on the same images at each call."""

    def __init__(self, config: OnlineConfig, train: Source, validation: Source, batch_size: int, **loading: int):
        # Now, not at the first evaluation: kNN needs as many training images as it has neighbors.
        if len(train) < ONLINE_KNN.k[0]:
            raise UserError(
                f"eval.online.every_steps={config.every_steps} needs {ONLINE_KNN.k[0]} training images, and there are"
                f" {len(train)}; 0 turns it off"
            )
        # The same images at every call, so that differences between scores are the encoder's.
        self.train = random_subset(train, config.train_images)
        self.validation = random_subset(validation, config.validation_images)
        self.batch_size, self.loading = batch_size, loading

    def __call__(self, extractor: FeatureExtractor) -> dict[str, float]:
        """`val/probe_top1` (logistic regression) and `val/knn_top1` (k 20, cosine) of the last layer, in percent."""
        # Features are extracted once, for both protocols. The score is that on validation: there is no test split here.
        train = EvalDataset(extractor, self.train, self.batch_size, **self.loading)
        validation = EvalDataset(extractor, self.validation, self.batch_size, **self.loading)
        data = ProtocolData(train, validation, self.train.classes, jr.key(0))  # neither protocol uses the key
        (probe,), (neighbors,) = logistic(data, ONLINE_LOGISTIC), knn(data, ONLINE_KNN)
        return {
            "val/probe_top1": probe.settings["validation_top1"],
            "val/knn_top1": neighbors.settings["validation_top1"],
        }
