"""Inputs and results of protocols, predictions, and accuracy with its 95% interval."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import binom

from jepax.evals.checks import check_labels
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.features import run_batches
from jepax.evals.programs import eval_jit
from jepax.evals.progress import SILENT, Progress
from jepax.types import AnyArray, Array, Float, ImageBatch, Int, PRNGKeyArray

MAX_K = 5
NO_CLASS = -1
"""Fills a prediction where a class has no finite value. It is never correct."""
CI95 = (0.025, 0.975)
TopKPredictions = Int[np.ndarray, "*heads n k"]
"""The likeliest classes of each example, best first, at most `MAX_K` of them."""


@dataclass(frozen=True)
class ProtocolData:
    """Input of a protocol. **Raises** `UserError` if a split is empty or has a label outside [0, classes)."""

    train: EvalDataset
    validation: EvalDataset
    classes: int
    key: PRNGKeyArray
    progress: Progress = SILENT

    def __post_init__(self):
        check_labels(self.train.labels, self.classes, "train")
        check_labels(self.validation.labels, self.classes, "validation")


@dataclass(frozen=True)
class FittedProbe:
    """A protocol's result on the training and validation splits. It has not seen a label of the test split."""

    name: str
    """Name among the protocol's results. Results of one name are repeats, reported by mean and standard deviation."""
    predict: Callable[[EvalDataset], TopKPredictions]
    """Predicts every example of a dataset without reading its labels."""
    settings: dict[str, Any]
    """The trial that validation chose, including its `validation_top1` in percent."""
    variant: str = ""
    """The settings as text."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Every trial, each with its `validation_top1`."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent of the examples."""

    top1: float
    top5: float
    ci95: tuple[float, float]
    """95% bootstrap percentile interval of top-1 over the examples.

    A resample of n hits and misses with replacement has Binomial(n, top1) hits, so these are that distribution's
    quantiles: the limit of infinitely many resamples. It measures the noise of the test split, not of the seed.
    """


def topk(values: Float[AnyArray, "*heads n classes"]) -> TopKPredictions:
    """The classes of greatest value, ties by class number; `NO_CLASS` where the value is NaN or -inf."""
    values = np.asarray(values, np.float32)
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=-1, kind="stable")[..., :MAX_K]
    is_finite = np.take_along_axis(values, order, axis=-1) > -np.inf
    return np.where(is_finite, order, NO_CLASS).astype(np.int32)


def predict(
    function: Callable[[ImageBatch], Float[Array, "*heads batch classes"]], dataset: EvalDataset
) -> TopKPredictions:
    """Predictions for every example, in order. A leading axis of heads is kept.

    `function`, an Equinox module, returns each class's value for a batch of images and does not see the labels. It is
    compiled once for all datasets.

    **Raises** `UserError` if the split is empty.
    """
    outputs = run_batches(partial(_values, function), dataset.images())
    return np.concatenate([topk(np.asarray(values)[..., :valid, :]) for values, valid in outputs], axis=-2)


@eval_jit
def _values(
    function: Callable[[ImageBatch], Float[Array, "*heads batch classes"]], images: ImageBatch
) -> Float[Array, "*heads batch classes"]:
    return function(images)


def accuracy(predictions: TopKPredictions, labels: Int[AnyArray, "n"]) -> Accuracy:
    """Top-1 and top-5 of predictions against the labels."""
    hits = predictions == np.asarray(labels)[:, None]
    count, first = len(hits), int(hits[:, 0].sum())
    low, high = (100 * float(quantile) / count for quantile in binom.ppf(CI95, count, first / count))
    return Accuracy(100 * first / count, 100 * int(hits.any(axis=1).sum()) / count, (low, high))


def top1_accuracy(predictions: TopKPredictions, labels: Int[AnyArray, "n"]) -> float:
    """Top-1 in percent."""
    return 100 * float(np.mean(predictions[:, 0] == np.asarray(labels)))


def best_trial(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial of greatest validation top-1; the first one if several are equal."""
    return max(trials, key=lambda trial: trial["validation_top1"])
