"""Logistic regression protocol: validation chooses the L2 penalty and the layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from jepax.evals.checks import field_check
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import LayerChoice
from jepax.evals.features import Labels, SplitLayers
from jepax.evals.logistic_solver import FittedLogistic, regularization_path
from jepax.evals.scoring import FittedProbe, ProtocolData, TopKPredictions, best_trial, top1_accuracy, topk

Fit = tuple[dict[str, Any], FittedLogistic]
"""A trial and its model."""


@dataclass(frozen=True)
class LogisticConfig:
    """Validation chooses among every L2 penalty on each choice of layers."""

    l2_penalties: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """L2 penalties, fitted from the strongest down."""
    layers: tuple[LayerChoice, ...] = ("last", "last four")
    """Input: the last layer, or the concatenation of the last four."""

    def __post_init__(self):
        check, choices, penalties = field_check("logistic", self), get_args(LayerChoice), self.l2_penalties
        check("l2_penalties", len(penalties) > 0 and min(penalties) > 0, "at least one number, all above 0")
        check("layers", 0 < len(self.layers) and set(self.layers) <= set(choices), f"at least one of {choices}")


def logistic(data: ProtocolData, config: LogisticConfig) -> list[FittedProbe]:
    """Returns the best penalty and layers by validation top-1; the first, with the strongest penalty, among equals."""
    # An extractor of one layer, such as raw pixels, has only the last one.
    has_several, fits = len(data.train.features.layers) > 1, []
    names = [name for name in config.layers if has_several or name == "last"] or ["last"]
    with data.progress.bar("logistic regression", len(names) * len(config.l2_penalties)) as update:
        for name in names:
            x, x_validation = select_layers(data.train, name), select_layers(data.validation, name)

            # From the strongest penalty down: each fit starts from the one before it, so it needs fewer iterations.
            path = regularization_path(x, data.train.labels, data.classes, config.l2_penalties)
            for trial, model in score_path(path, x_validation, data.validation.labels):
                fits.append(({"layers": name, **trial}, model))
                update(len(fits))

    # Validation chooses; the model was fitted on the training split alone.
    best, model, tried = select_fit(fits)
    variant = f"{best['layers']}, strength {best['strength']:g}"
    return [FittedProbe("logistic regression", partial(predict, model, best["layers"]), best, variant, tried)]


def select_layers(dataset: EvalDataset, name: LayerChoice) -> SplitLayers:
    """The layers of that name, without a copy."""
    # Features are of the last four layers, or of all if there are fewer.
    layers = dataset.features.layers
    return layers[-1:] if name == "last" else layers


def score_path(path: Iterator[tuple[float, FittedLogistic]], features: SplitLayers, labels: Labels) -> Iterator[Fit]:
    """Yields each fit of a path with its trial: penalty, convergence and validation top-1."""
    for strength, model in path:
        info = {"strength": strength, "converged": model.converged, "iterations": model.iterations}
        yield {**info, "validation_top1": top1_accuracy(topk(model(features)), labels)}, model


def select_fit(fits: list[Fit]) -> tuple[dict[str, Any], FittedLogistic, list[dict[str, Any]]]:
    """The best trial, its model, and all trials."""
    tried = [trial for trial, _ in fits]
    best = best_trial(tried)
    return best, next(model for trial, model in fits if trial is best), tried


def predict(model: FittedLogistic, name: LayerChoice, dataset: EvalDataset) -> TopKPredictions:
    """The classes of greatest logit."""
    return topk(model(select_layers(dataset, name)))
