"""Logistic regression protocol: validation chooses the L2 penalty and the layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from jepax.evals.checks import field_check
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import LayerChoice
from jepax.evals.logistic_solver import FittedLogistic, regularization_path
from jepax.evals.scoring import FittedProbe, ProtocolData, TopKPredictions, best_trial, top1_accuracy, topk
from jepax.types import Float, Int


@dataclass(frozen=True)
class LogisticConfig:
    """Validation chooses among every L2 penalty on each choice of layers."""

    l2_penalties: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """L2 penalties, fitted from the strongest down."""
    layers: tuple[LayerChoice, ...] = ("last", "last four")
    """Input: the last layer, or the concatenation of the last four."""

    def __post_init__(self):
        check, choices = field_check("logistic", self), get_args(LayerChoice)
        check(
            "l2_penalties",
            len(self.l2_penalties) > 0 and min(self.l2_penalties) > 0,
            "at least one number, all above 0",
        )
        check("layers", 0 < len(self.layers) and set(self.layers) <= set(choices), f"at least one of {choices}")


def logistic(data: ProtocolData, config: LogisticConfig) -> list[FittedProbe]:
    """Returns the best penalty and layers by validation top-1; the first, with the strongest penalty, among equals."""
    has_several, fits = len(data.train.features.layers) > 1, []
    names = [name for name in config.layers if has_several or name == "last"] or ["last"]
    with data.progress.bar("logistic regression", len(names) * len(config.l2_penalties)) as update:
        for name in names:
            x, x_validation = select_layers(data.train, name), select_layers(data.validation, name)
            path = regularization_path(x, data.train.labels, data.classes, config.l2_penalties)
            for trial, model in score_path(path, x_validation, data.validation.labels):
                fits.append(({"layers": name, **trial}, model))
                update(len(fits))
    best, model, tried = select_fit(fits)
    predict = make_predictor(model, best["layers"])
    variant = f"{best['layers']}, strength {best['strength']:g}"
    return [FittedProbe("logistic regression", predict, best, variant, tried)]


def select_layers(dataset: EvalDataset, name: LayerChoice) -> Float[np.ndarray, "layers n dim"]:
    """The layers of that name, without a copy."""
    layers = dataset.features.layers
    return layers[-1:] if name == "last" else layers


def score_path(
    path: Iterator[tuple[float, FittedLogistic]],
    features: Float[np.ndarray, "layers n dim"],
    labels: Int[np.ndarray, "n"],
) -> Iterator[tuple[dict[str, Any], FittedLogistic]]:
    """Yields each fit of a path with its trial: penalty, convergence and validation top-1."""
    for strength, model in path:
        info = {"strength": strength, "converged": model.converged, "iterations": model.iterations}
        yield {**info, "validation_top1": top1_accuracy(topk(model(features)), labels)}, model


def select_fit(
    fits: list[tuple[dict[str, Any], FittedLogistic]],
) -> tuple[dict[str, Any], FittedLogistic, list[dict[str, Any]]]:
    """The best trial, its model, and all trials."""
    tried = [trial for trial, _ in fits]
    best = best_trial(tried)
    return best, next(model for trial, model in fits if trial is best), tried


def make_predictor(model: FittedLogistic, name: LayerChoice) -> Callable[[EvalDataset], TopKPredictions]:
    """A function that predicts the classes of greatest logit."""
    return lambda dataset: topk(model(select_layers(dataset, name)))
