"""Plots the metrics in a run's `metrics.jsonl` over its steps, one panel per quantity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from jepax.health.alerts import Alert

INK, ORANGE, BLUE, RED = "#222222", "#E69F00", "#0072B2", "#D55E00"  # safe for the color-blind (Okabe, Ito)
NUM_COLUMNS = 3
LOG_SCALE_MIN_RATIO = 10.0
"""Smallest ratio of the greatest to the least value at which a panel has a logarithmic axis."""
SMOOTHING_DIVISOR, MAX_SMOOTHING_REACH = 20, 100
"""The running median's window: the number of records divided by the first, at most the second on each side."""


@dataclass(frozen=True)
class Panel:
    """One quantity: its axis title with the unit, and the metrics that are drawn on it."""

    title: str
    metrics: dict[str, tuple[str | tuple[str, ...], str]]
    """Legend name and color by metric. A metric with several values, one per block or name, ignores the color."""
    axis: Literal["log", "linear", "zero"] = "log"
    """`log`: logarithmic where the values span `LOG_SCALE_MIN_RATIO`, else linear; `zero`: linear, from 0."""
    points: bool = False
    """True: values are shown as markers, without smoothing, since few records have one."""
    cut: float | None = None
    """Lower limit of a linear axis, unless more than a tenth of the values are below it: rare low values do not hide
    the others."""


def of_embeddings(name: str) -> dict[str, tuple[str, str]]:
    """The same metric of the projections and of the embeddings."""
    return {f"health/projection/{name}": ("projections", ORANGE), f"health/embedding/{name}": ("embeddings", INK)}


QUANTILE_LABELS = (("least", "10%", "median", "90%", "greatest"), "")
"""Labels of the features' standard deviations, in the order of logging."""
PANELS = (
    Panel("loss", {"train/loss_max": ("highest of a step", ORANGE), "train/loss": ("loss", INK)}),
    Panel(
        "validation top-1 during training (%)",
        {"val/probe_top1": ("linear probe", BLUE), "val/knn_top1": ("kNN", ORANGE)},
        "linear",
        points=True,
    ),
    Panel("share of loss explained", {"train/explained_variance": ("explained", INK)}, "linear", cut=-1.0),
    Panel(
        "gradient norm (L2)",
        {
            "grad_norm/encoder_blocks": ("encoder block", ""),
            "optim/grad_norm_max": ("highest of a step", ORANGE),
            "optim/grad_norm": ("all parameters", INK),
        },
    ),
    Panel(
        "gradient norm, predictor (L2)",
        {"grad_norm/predictor_blocks": ("block", ""), "grad_norm/predictor": ("predictor", INK)},
    ),
    Panel("effective rank (dimensions)", of_embeddings("rankme"), "zero"),
    Panel("slope of the spectrum", of_embeddings("alpha_req")),
    Panel("cosine between images", of_embeddings("mean_cosine"), "linear"),
    Panel(
        "deviation of embeddings' features",
        {"health/embedding/std_quantiles": QUANTILE_LABELS, "health/embedding/std": ("mean", INK)},
    ),
    Panel(
        "deviation of projections' features",
        {"health/projection/std_quantiles": QUANTILE_LABELS, "health/projection/std": ("mean", INK)},
    ),
    Panel("share of dead features", of_embeddings("dead_fraction"), "zero"),
    Panel(
        "norm of a token or projection (L2)",
        {"health/target_norm": ("target", BLUE), "health/prediction_norm": ("prediction", ORANGE)},
        "zero",
    ),
    Panel("distance to the teacher (share)", {"ema/relative_distance": ("distance", INK)}, "zero"),
    Panel(
        "change per step (L2 norm)",
        {
            "optim/update_norm": ("trained parameters", INK),
            "ema/expected_update_norm": ("teacher, expected", ORANGE),
            "ema/update_norm": ("teacher", BLUE),
        },
    ),
    Panel("images per second", {"perf/images_per_sec": ("speed", INK)}, "zero"),
    Panel(
        "utilization (MFU)",
        {"perf/mfu": ("of the nominal peak", INK), "perf/mfu_measured": ("of the measured peak", ORANGE)},
        "zero",
    ),
    Panel("learning rate", {"optim/lr": ("learning rate", INK)}, "zero"),
    Panel("momentum", {"ema/momentum": ("momentum", INK)}, "linear"),
    Panel("weight decay", {"optim/weight_decay": ("weight decay", INK)}, "zero"),
    Panel(
        "share of non-zeros",
        {"health/nonzero_fraction": ("measured", INK), "health/nonzero_fraction_expected": ("of the target", ORANGE)},
        "zero",
    ),
)
"""Panels in reading order. Metrics that were not logged are left out, and so are panels without any."""
NOT_DRAWN = {"step", "perf/step_time", "perf/tflops", "val/seconds"}


def choose_panels(lines: list[dict]) -> tuple[Panel, ...]:
    """Returns `PANELS`, and one more for each metric in none of them, such as a term of a method's own loss."""
    known = NOT_DRAWN.union(*(panel.metrics for panel in PANELS))
    others = dict.fromkeys(name for line in lines for name in line if name not in known)
    return (*PANELS, *(Panel(name.replace("_", " "), {name: (name, INK)}) for name in others))


class Series:
    """One metric over the steps at which it was logged."""

    def __init__(self, lines: list[dict], name: str):
        rows = [(line["step"], line[name]) for line in lines if name in line]
        self.steps: Int[np.ndarray, "lines"] = np.array([step for step, _ in rows], int)
        values = np.array([value for _, value in rows], float)  # None (not finite) becomes nan
        self.values: Float[np.ndarray, "lines layers"] = values.reshape(len(rows), -1 if rows else 1)
        self.by_layer = values.ndim == 2
        self.lost: Int[np.ndarray, "lost"] = self.steps[~np.isfinite(self.values).all(axis=1)]
        """Steps with a value that is not finite."""
        self.is_zero = not np.any(np.nan_to_num(self.values, nan=1.0))
        """True if the metric is always zero, because the method does not have it, or was never logged."""


def running_median(values: Float[np.ndarray, "lines"], reach: int) -> Float[np.ndarray, "lines"]:
    """Median of the finite values up to `reach` records before and after; nan stays nan.

    Near the first record the window shrinks equally on both sides, so that a steep start is not smoothed away.
    """
    padded = np.pad(values, reach, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    offsets = np.abs(np.arange(2 * reach + 1) - reach)
    inside = offsets <= np.arange(len(values))[:, None]
    medians = np.full(len(values), np.nan)
    finite = np.isfinite(values)  # each such window includes its own value, so none is all nan
    if finite.any():
        medians[finite] = np.nanmedian(np.where(inside, windows, np.nan)[finite], axis=1)
    return medians


def plot_curves(lines: list[dict], title: str, alarms: Sequence[Alert] = ()) -> Figure:
    """Plots a run's log. `lines`: at least one record, as `logger.read_metrics` returns them.

    An alarm is a vertical line in every panel, labeled in the loss's panel.
    """
    panels = [(panel, series) for panel in choose_panels(lines) if (series := _select_series(panel, lines))]
    rows = -(-len(panels) // NUM_COLUMNS)
    figure = Figure(figsize=(13, 0.7 + 2.9 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(rows, NUM_COLUMNS, squeeze=False).reshape(-1)
    reach = min(len(lines) // (2 * SMOOTHING_DIVISOR), MAX_SMOOTHING_REACH)
    for cell, (panel, series) in zip(axes, panels, strict=False):
        if len(lines) < 3:  # too few points for a curve
            cell.set_prop_cycle(marker=["o"])
        _draw_panel(cell, panel, series, reach)
        _style_axes(cell, panel, np.concatenate([each.values.reshape(-1) for each in series.values()]))
        cell.set_xlim(lines[0]["step"], max(lines[-1]["step"], lines[0]["step"] + 1))
        _mark_alerts(cell, alarms, named="train/loss" in series)
    for cell in axes[len(panels) :]:
        cell.set_axis_off()
    smoothed = f"; light: as logged, dark: running median over {2 * reach + 1} lines" if reach else ""
    figure.suptitle(f"{title}: steps {lines[0]['step']} to {lines[-1]['step']}{smoothed}", fontsize=11)
    figure.supxlabel("step", fontsize=10)
    return figure


def _select_series(panel: Panel, lines: list[dict]) -> dict[str, Series]:
    logged = {name: each for name in panel.metrics if len((each := Series(lines, name)).steps)}
    return {name: each for name, each in logged.items() if not each.is_zero} or logged


def _draw_panel(axes: Axes, panel: Panel, series: dict[str, Series], reach: int) -> None:
    for name, each in series.items():
        label, color = panel.metrics[name]
        if each.by_layer:
            _draw_layers(axes, each, label, reach)
        else:
            _draw_series(axes, each, label, color, reach, panel.points)

    # Crosses just above the axis, at the steps whose values cannot be drawn.
    lost = sorted({int(step) for each in series.values() for step in each.lost})
    if lost:
        style = {"color": RED, "markersize": 6, "markeredgewidth": 1.6, "zorder": 5}
        place = axes.get_xaxis_transform()
        axes.plot(lost, [0.03] * len(lost), "x", label="not finite", transform=place, **style)
    if len(series) > 1 or lost or any(each.by_layer for each in series.values()):
        axes.legend(fontsize=8, frameon=False, loc="best")


def _draw_series(axes: Axes, series: Series, label: str, color: str, reach: int, points: bool) -> None:
    values = series.values[:, 0]
    if points:
        axes.plot(series.steps, values, color=color, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    if reach:
        axes.plot(series.steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(series.steps, running_median(values, reach), color=color, linewidth=1.6, label=label)


def _draw_layers(axes: Axes, series: Series, label: str | tuple[str, ...], reach: int) -> None:
    """Draws thin smoothed curves from dark (first block) to light; the legend names the first and the last."""
    last = series.values.shape[1] - 1
    for layer, values in enumerate(series.values.T):
        color = colormaps["viridis"](0.9 * layer / max(last, 1))
        name = f"{label} {layer + 1}" if isinstance(label, str) else label[layer]
        shown = name if layer in (0, last) else None
        axes.plot(series.steps, running_median(values, reach), color=color, linewidth=0.8, label=shown)


def _mark_alerts(axes: Axes, alarms: Sequence[Alert], named: bool) -> None:
    """Draws vertical lines at the alarms' steps, with their names one below the other."""
    for row, alarm in enumerate(alarms):
        axes.axvline(alarm.step, color=RED, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1.5)
        if named:
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "zorder": 6}
            axes.annotate(alarm.kind, (alarm.step, 1), xytext=(3, -4 - 10 * row), color=RED, fontsize=8, **place)


def _style_axes(axes: Axes, panel: Panel, values: Float[np.ndarray, "values"]) -> None:
    finite = values[np.isfinite(values)]
    spread = _dynamic_range(finite)
    if panel.axis == "log" and spread >= LOG_SCALE_MIN_RATIO:
        axes.set_yscale("log")
        if spread < 1000:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        if panel.axis == "zero":
            axes.set_ylim(0, 1.08 * np.max(finite, initial=0) or 1)
        if panel.cut is not None and np.min(finite, initial=panel.cut) < panel.cut:
            axes.set_ylim(min(panel.cut, 1.08 * np.quantile(finite, 0.1)), max(1.08 * np.max(finite), 0.0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel(panel.title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _dynamic_range(finite: Float[np.ndarray, "values"]) -> float:
    """Greatest over least value; 1 if a tenth or more is not above 0. The teacher's last step may be exactly 0."""
    positive = finite[finite > 0]
    if not len(positive) or len(positive) < 0.9 * len(finite):
        return 1.0
    return float(positive.max() / positive.min())
