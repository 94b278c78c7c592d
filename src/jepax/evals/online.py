"""Evaluation during training: a probe and nearest neighbours on a few held-out pictures, beside the loss."""

from dataclasses import dataclass

import jax.random as jr

from jepax.data import Source
from jepax.evals.eval_dataset import EvalDataset, random_subset
from jepax.evals.feature_extractor import FeatureExtractor
from jepax.evals.knn import KnnConfig, knn
from jepax.evals.logistic import LogisticConfig, logistic
from jepax.types import UserError

ONLINE_KNN = KnnConfig(neighbours=(20,), temperatures=(0.07,))
ONLINE_LOGISTIC = LogisticConfig(strengths=(1e-3,), layers=("last",))
"""Nothing is chosen: the scores of one run may be compared from step to step."""


@dataclass(frozen=True)
class OnlineConfig:
    """When, and on how many pictures. The test split is never opened."""

    every: int = 500
    """Steps between evaluations, each at the next line of the log; 0: none."""
    train_images: int = 2048
    """Pictures of the training split that the probe is fitted on and that neighbours are looked for among."""
    validation_images: int = 1024
    """Pictures of the validation split that are scored."""

    def __post_init__(self):
        if self.every < 0:
            raise UserError(f"online.every={self.every} must not be negative; 0 leaves it to the end")
        for name, least in (("train_images", ONLINE_KNN.neighbours[0]), ("validation_images", 1)):
            if getattr(self, name) < least:
                raise UserError(f"online.{name}={getattr(self, name)} must be at least {least}")


class OnlineEval:
    """The pictures of a run's evaluations, read once more at each."""

    def __init__(
        self,
        config: OnlineConfig,
        train: Source,
        validation: Source,
        batch_size: int,
        *,
        threads: int = 2,
        workers: int = 0,
    ):
        if len(train) < ONLINE_KNN.neighbours[0]:
            raise UserError(
                f"eval.online.every={config.every} needs {ONLINE_KNN.neighbours[0]} training pictures, and there are"
                f" {len(train)}; 0 leaves evaluation to the end"
            )
        self.train = random_subset(train, config.train_images)
        self.validation = random_subset(validation, config.validation_images)
        self.batch_size, self.reading = batch_size, {"threads": threads, "workers": workers}

    def __call__(self, row: FeatureExtractor) -> dict[str, float]:
        """`probe_top1` (logistic regression) and `knn_top1` (k 20, cosine) of the last layer on validation, percent."""
        train, validation = (
            EvalDataset(row, each, self.batch_size, **self.reading) for each in (self.train, self.validation)
        )
        splits, key = (train, validation, self.train.classes), jr.key(0)  # which draws nothing here
        (probe,) = logistic(*splits, ONLINE_LOGISTIC, key=key)
        (neighbours,) = knn(*splits, ONLINE_KNN, key=key)
        tops = {"probe_top1": probe, "knn_top1": neighbours}
        return {name: fitted.settings["validation_top1"] for name, fitted in tops.items()}
