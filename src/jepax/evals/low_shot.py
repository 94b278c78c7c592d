"""Classification from few labels: logistic regression on a labelled part of the training examples, drawn repeatedly."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.logistic import (
    FeatureScaler,
    check_l2_penalties,
    fit_info,
    fit_scaler,
    make_predictor,
    regularization_path,
    select_layers,
)
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.scoring import FittedProbe, check_labels, top1_accuracy, topk_classes
from jepax.types import Int, PRNGKeyArray, UserError


@dataclass(frozen=True)
class LowShotConfig:
    """How many labels, and how often they are drawn anew."""

    shares: tuple[float, ...] = (0.01, 0.1)
    """Of the training examples, the same share of every class (rounded), and at least one of each."""
    per_class: tuple[int, ...] = (1, 5, 10)
    """Labelled examples of every class."""
    seeds: int = 5
    """Draws of each, by the seeds 0, 1, ...; their mean and deviation are what to read."""
    strengths: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    """Weights of the L2 penalty."""

    def __post_init__(self):
        if not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"shares={self.shares} must lie above 0 and at most at 1; 1% is 0.01")
        if not all(count >= 1 for count in self.per_class):
            raise UserError(f"per_class={self.per_class} must hold no number below 1")
        if not (self.shares or self.per_class):
            raise UserError(
                "shares=() and per_class=() ask for nothing; give at least one of either, as shares=(0.01,)"
            )
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds} must be at least 1")
        check_l2_penalties(self.strengths)


def low_shot(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: LowShotConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """One answer per shot and seed, named by its shot. A classifier sees only the labels that its seed drew.

    The budget is of labels: the strength is chosen on validation examples that the same seed drew, of every class at
    most as many as are labelled for training. A larger validation split would hold more labels than the task allows
    (Oliver et al. 2018, arXiv:1804.09170, section 4.6). All training features standardise: that needs no label.

    The draw is fixed by the seed alone, so that every encoder is given the same examples, and those of a smaller shot
    are among those of a larger one. `key` is not used.

    Only the last layer is read: so few validation labels cannot also choose layers.

    A shot that asks for more examples than some class has is left out, and `say` tells so.

    **Raises** `UserError` if no shot is left, a split is empty, or a label is out of range.
    """
    check_labels(train.labels, classes, "train")
    check_labels(validation.labels, classes, "validation")
    shots = dict(examples_per_class(train.labels, classes, config, say))
    if not shots:
        least = min(n for n in np.bincount(train.labels) if n)
        raise UserError(f"per_class={config.per_class} are all more than the {least} examples of the smallest class")
    standard = fit_scaler(select_layers(train, "last"))
    answers = []
    with say.counting("low-shot", len(shots) * config.seeds) as done:
        for name, counts in shots.items():
            for seed in range(config.seeds):
                answers.append(_fit_draw(name, counts, seed, train, validation, config, standard))
                done(len(answers))
    return answers


def examples_per_class(
    labels: Int[np.ndarray, "n"], classes: int, config: LowShotConfig, say: ProgressReporter
) -> Iterator[tuple[str, Int[np.ndarray, "classes"]]]:
    """Every shot that can be drawn: its name, and its examples of each class. Classes without an example have none."""
    there = np.bincount(labels, minlength=classes)
    for share in config.shares:
        yield f"{100 * share:g}%", np.where(there > 0, np.maximum(np.rint(share * there), 1), 0).astype(np.int64)
    least = there[there > 0].min()
    for count in config.per_class:
        if count <= least:
            yield f"{count} per class", np.where(there > 0, count, 0)
        else:
            say.line(f"low-shot: {count} per class is left out, since the smallest class has {least} training examples")


def sample_rows(
    labels: Int[np.ndarray, "n"], counts: Int[np.ndarray, "classes"], seed: int, part: int
) -> Int[np.ndarray, "drawn"]:
    """Rows, ascending: of each class so many as `counts` says, or all it has, in an order that seed and part decide.

    Built on raw Philox words, whose stream NumPy promises to keep, so the draw outlives NumPy's releases.
    """
    words = np.random.Philox((seed, part)).random_raw(len(labels))
    order = np.lexsort((words, labels))  # class after class, at random within each
    ordered = labels[order]
    rank = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(order[rank < counts[ordered]])


def _fit_draw(
    name: str,
    counts: Int[np.ndarray, "classes"],
    seed: int,
    train: EvalDataset,
    validation: EvalDataset,
    config: LowShotConfig,
    standard: FeatureScaler,
) -> FittedProbe:
    rows, held = sample_rows(train.labels, counts, seed, 0), sample_rows(validation.labels, counts, seed, 1)
    truth, seen = validation.labels[held], select_layers(validation, "last")[:, held]
    check_labels(truth, len(counts), "validation")
    tried, best = [], None
    for strength, model in regularization_path(
        select_layers(train, "last")[:, rows], train.labels[rows], len(counts), config.strengths, standard
    ):
        reached = top1_accuracy(topk_classes(model(seen)), truth)
        tried.append({**fit_info(strength, model), "validation_top1": reached})
        if best is None or reached > best[0]["validation_top1"]:  # of equals the strongest
            best = (tried[-1], model)
    chosen, model = best
    settings = {**chosen, "seed": seed, "labels": len(rows), "validation_labels": len(held)}
    return FittedProbe(name, make_predictor(model, "last"), settings, f"strength {chosen['strength']:g}", tried)
