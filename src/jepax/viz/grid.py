"""Plots the score of every run of a sweep, with the baselines."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 120
LINEAR_COLOR, KNN_COLOR = "#0072B2", "#E69F00"
"""Colors of the protocols, safe for the color-blind (Okabe, Ito)."""
PROTOCOL_LABELS = {"linear": "linear", "knn": "kNN"}
BASELINE_LABELS = {"untrained": "untrained", "pixels": "raw pixels"}


@runtime_checkable
class Scored(Protocol):
    """The numbers of a run that are drawn; accuracies in percent."""

    row: str
    linear: float
    knn: float
    untrained_linear: float
    untrained_knn: float
    pixels_linear: float
    pixels_knn: float
    effective_rank: float
    minutes: float


def plot_sweep(title: str, runs: Sequence[Scored]) -> Figure:
    """Plots rows from top to bottom: a dot per seed, a bar at their mean, baselines as marks; then rank and minutes."""
    names = list(dict.fromkeys(run.row for run in runs))
    figure = Figure(figsize=(9.5, 1.1 + 0.34 * len(names)), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1.4, 1.4))
    _draw_scores(axes[0], names, runs)
    for panel, field, label in zip(axes[1:], ("effective_rank", "minutes"), ("effective rank", "minutes"), strict=True):
        means = [_mean([getattr(run, field) for run in runs if run.row == name]) for name in names]
        panel.barh(range(len(names)), means, color="#BBBBBB", height=0.6)
        panel.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def _draw_scores(axes: Axes, names: list[str], runs: Sequence[Scored]) -> None:
    for field, color, label, shift in (("linear", LINEAR_COLOR, "linear", -0.12), ("knn", KNN_COLOR, "kNN", 0.12)):
        for place, name in enumerate(names):
            scores = [getattr(run, field) for run in runs if run.row == name]
            first = label if place == 0 else None
            heights = [place + shift] * len(scores)
            axes.plot(scores, heights, "o", color=color, markersize=4, alpha=0.7, label=first)
            axes.vlines(_mean(scores), place + shift - 0.16, place + shift + 0.16, color=color, linewidth=2)
    for kind, shift, color in (("linear", -0.12, LINEAR_COLOR), ("knn", 0.12, KNN_COLOR)):
        for floor, mark in (("untrained", "|"), ("pixels", "x")):
            means = [_mean([getattr(run, f"{floor}_{kind}") for run in runs if run.row == name]) for name in names]
            label = f"{BASELINE_LABELS[floor]}, {PROTOCOL_LABELS[kind]}"
            heights = [place + shift for place in range(len(names))]
            axes.plot(means, heights, mark, color=color, markersize=6, alpha=0.5, label=label)
    axes.set_xlabel("test top-1, %")
    axes.grid(axis="x", alpha=0.3)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
