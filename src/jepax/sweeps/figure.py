"""Plots the score of every run of a sweep, with the baselines."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jepax.sweeps.table import Result

PROTOCOLS = {"linear": ("linear", "#0072B2", -0.12), "knn": ("kNN", "#E69F00", 0.12)}
"""Label, color (safe for the color-blind: Okabe, Ito) and vertical shift of each protocol."""
BASELINES = {"untrained": ("untrained", "|"), "pixels": ("raw pixels", "x")}
"""Label and marker of each baseline."""


def plot_sweep(title: str, results: Sequence[Result]) -> Figure:
    """Plots rows from top to bottom: a dot per seed, a bar at their mean, baselines as marks; then rank and minutes."""
    names = list(dict.fromkeys(result.row for result in results))
    figure = Figure(figsize=(9.5, 1.1 + 0.34 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1.4, 1.4))
    _draw_scores(axes[0], names, results)
    for panel, field, label in zip(axes[1:], ("effective_rank", "minutes"), ("effective rank", "minutes"), strict=True):
        panel.barh(
            range(len(names)), [_mean(_values(results, name, field)) for name in names], color="#BBBBBB", height=0.6
        )
        panel.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def _draw_scores(axes: Axes, names: list[str], results: Sequence[Result]) -> None:
    for field, (label, color, shift) in PROTOCOLS.items():
        for row, name in enumerate(names):
            scores, y, once = _values(results, name, field), row + shift, label if row == 0 else None
            axes.plot(scores, [y] * len(scores), "o", color=color, markersize=4, alpha=0.7, label=once)
            axes.vlines(_mean(scores), y - 0.16, y + 0.16, color=color, linewidth=2)
    for field, (label, color, shift) in PROTOCOLS.items():
        for baseline, (baseline_label, marker) in BASELINES.items():
            means = [_mean(_values(results, name, f"{baseline}_{field}")) for name in names]
            heights, both = [row + shift for row in range(len(names))], f"{baseline_label}, {label}"
            axes.plot(means, heights, marker, color=color, markersize=6, alpha=0.5, label=both)
    axes.set_xlabel("test top-1, %")
    axes.grid(axis="x", alpha=0.3)


def _values(results: Sequence[Result], row: str, field: str) -> list[float]:
    return [getattr(result, field) for result in results if result.row == row]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
