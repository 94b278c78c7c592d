"""What protocols answer, and what it is worth: guesses of classes, and accuracies with their intervals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binom

from jepax.evals.eval_dataset import EvalDataset
from jepax.types import AnyArray, Float, Int, UserError

TOP_K = 5
NO_CLASS = -1
"""In a guess: no class was named. It is never right."""
CI95_QUANTILES = (0.025, 0.975)
TopKPredictions = Int[np.ndarray, "n guesses"]
"""The likeliest classes of each example, best first, at most `GUESSES` of them."""


@dataclass(frozen=True)
class FittedProbe:
    """What a protocol made of the training and validation splits. It has not seen a label of the test split."""

    name: str
    """What it is among the protocol's answers; answers of one name are repeats, shown by their mean and deviation."""
    guess: Callable[[EvalDataset], TopKPredictions]
    """Guesses of a split whose labels it does not read."""
    settings: dict[str, Any]
    """What validation chose; `validation_top1`, in percent, is among it."""
    variant: str = ""
    """The settings in words."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """Every setting that validation chose among, with its `validation_top1`."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent of the examples."""

    top1: float
    top5: float
    interval: tuple[float, float]
    """Of top-1: bootstrap percentile interval of 95% over the examples.

    A resample of n hits and misses with replacement has Binomial(n, top1) hits, so the interval is that distribution's
    quantiles: what infinitely many resamples give. It tells the test split's noise, and not that of another seed.
    """


def topk_classes(values: Float[AnyArray, "n classes"]) -> TopKPredictions:
    """The classes of greatest value, by value and then by class number; `NONE` where the value is NaN or -inf."""
    values = np.asarray(values, np.float32)
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=1, kind="stable")[:, :TOP_K]
    named = np.take_along_axis(values, order, axis=1) > -np.inf
    return np.where(named, order, NO_CLASS).astype(np.int32)


def compute_accuracy(guesses: TopKPredictions, labels: Int[AnyArray, "n"]) -> Accuracy:
    """Top-1 and top-5 of guesses against the labels."""
    hits = guesses == np.asarray(labels)[:, None]
    count, first = len(hits), int(hits[:, 0].sum())
    low, high = (100 * float(q) / count for q in binom.ppf(CI95_QUANTILES, count, first / count))
    return Accuracy(100 * first / count, 100 * int(hits.any(axis=1).sum()) / count, (low, high))


def top1_accuracy(guesses: TopKPredictions, labels: Int[AnyArray, "n"]) -> float:
    """Top-1 in percent."""
    return 100 * float(np.mean(guesses[:, 0] == np.asarray(labels)))


def check_labels(labels: Int[AnyArray, "n"], classes: int, split: str) -> None:
    """**Raises** `UserError` unless the split has examples and every label lies in [0, classes)."""
    if len(labels) == 0:
        raise UserError(f"the {split} split has no examples; choose another split or source")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"labels of the {split} split run from {low} to {high}, outside [0, classes={classes}); set classes to the "
            "number of classes, and number them from 0"
        )
