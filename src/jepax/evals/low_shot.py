"""Classification from few labels: logistic regression on random labeled subsets of the training examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from jepax.evals.checks import check_labels, field_check
from jepax.evals.logistic import predict, score_path, select_fit, select_layers
from jepax.evals.logistic_solver import FeatureScaler, fit_scaler, regularization_path
from jepax.evals.progress import Progress
from jepax.evals.scoring import FittedProbe, ProtocolData
from jepax.types import Int, UserError


@dataclass(frozen=True)
class LowShotConfig:
    """Numbers of labels, and how often they are drawn."""

    label_fractions: tuple[float, ...] = (0.01, 0.1)
    """Fractions of the training examples, the same for every class (rounded), and at least one example of each."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Labeled examples of every class."""
    num_draws: int = 5
    """Draws of each, with the seeds 0, 1, ...; results are their mean and standard deviation."""
    l2_penalties: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    """L2 penalties."""

    def __post_init__(self):
        check, strengths = field_check("low_shot", self), self.l2_penalties
        fractions = all(0 < fraction <= 1 for fraction in self.label_fractions)
        check("label_fractions", fractions, "fractions in (0, 1]; 1% is 0.01")
        check("shots", all(count >= 1 for count in self.shots), "no number below 1")
        check("shots", bool(self.label_fractions or self.shots), "at least one number, unless label_fractions has one")
        check("num_draws", self.num_draws >= 1, "at least 1 draw")
        check("l2_penalties", len(strengths) > 0 and min(strengths) > 0, "at least one number, all above 0")


def low_shot(data: ProtocolData, config: LowShotConfig) -> list[FittedProbe]:
    """Returns one result per shot and seed, named by its shot. A classifier sees only the labels that its seed drew.

    The budget counts labels: the penalty is chosen on validation examples drawn by the same seed, for every class at
    most as many as are labeled for training. A larger validation split would use more labels than the task allows
    (Oliver et al. 2018, arXiv:1804.09170, section 4.6). Features are standardized over all training examples, which
    needs no label. Only the last layer is used: validation labels are too few to choose layers too.

    The draw depends on the seed alone, so every encoder gets the same examples, and the examples of a smaller shot
    are among those of a larger one. A shot with more examples than some class has is left out with a message.

    **Raises** `UserError` if no shot is left.
    """
    # Numbers of labels that the data allows: a shot needs that many examples of every class.
    labels, results = data.train.labels, []
    shots = dict(shot_counts(labels, data.classes, config, data.progress))
    if not shots:
        fewest = min(n for n in np.bincount(labels) if n)
        raise UserError(f"shots={config.shots} are all more than the {fewest} examples of the smallest class")

    # One scaler for all draws: mean and variance need no labels, and few examples would give poor ones.
    scaler = fit_scaler(select_layers(data.train, "last"))
    with data.progress.bar("low-shot", len(shots) * config.num_draws) as update:
        for name, counts in shots.items():
            for seed in range(config.num_draws):
                results.append(_fit_draw(name, counts, seed, data, config.l2_penalties, scaler))
                update(len(results))
    return results


def shot_counts(
    labels: Int[np.ndarray, "n"], classes: int, config: LowShotConfig, progress: Progress
) -> Iterator[tuple[str, Int[np.ndarray, "classes"]]]:
    """Yields the name of every possible shot and its number of examples of each class, 0 for classes without any."""
    # Classes without training examples have no labels to draw, and are left out of the smallest class too.
    available = np.bincount(labels, minlength=classes)
    for fraction in config.label_fractions:
        yield (
            f"{100 * fraction:g}%",
            np.where(available > 0, np.maximum(np.rint(fraction * available), 1), 0).astype(int),
        )
    fewest = available[available > 0].min()
    for count in config.shots:
        if count <= fewest:
            yield f"{count} per class", np.where(available > 0, count, 0)
        else:
            progress.log(
                f"low-shot: {count} per class is left out, since the smallest class has {fewest} training examples"
            )


def draw_rows(
    labels: Int[np.ndarray, "n"], counts: Int[np.ndarray, "classes"], seed: int, stream: int
) -> Int[np.ndarray, "drawn"]:
    """Rows, ascending: `counts` random examples of each class, or all it has. Seed and stream decide the draw.

    Uses raw Philox words, whose sequence NumPy guarantees across releases.
    """
    # Smaller counts are subsets of larger ones: both are the first examples of one random order.
    words = np.random.Philox((seed, stream)).random_raw(len(labels))
    order = np.lexsort((words, labels))  # by class, at random within each
    ordered = labels[order]
    rank = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(order[rank < counts[ordered]])


def _fit_draw(
    name: str,
    counts: Int[np.ndarray, "classes"],
    seed: int,
    data: ProtocolData,
    strengths: tuple[float, ...],
    scaler: FeatureScaler,
) -> FittedProbe:
    """Fits the labels that the seed draws."""
    # Streams 0 and 1: independent draws from training and validation examples.
    train, validation = data.train, data.validation
    rows, held_out = draw_rows(train.labels, counts, seed, 0), draw_rows(validation.labels, counts, seed, 1)
    truth = validation.labels[held_out]
    check_labels(truth, data.classes, "validation")

    # Fit on the drawn training examples, and choose the penalty on the drawn validation examples.
    x, x_validation = select_layers(train, "last")[:, rows], select_layers(validation, "last")[:, held_out]
    path = regularization_path(x, train.labels[rows], data.classes, strengths, scaler)
    best, model, tried = select_fit(list(score_path(path, x_validation, truth)))
    settings = {**best, "seed": seed, "labels": len(rows), "validation_labels": len(held_out)}
    return FittedProbe(name, partial(predict, model, "last"), settings, f"strength {best['strength']:g}", tried)
