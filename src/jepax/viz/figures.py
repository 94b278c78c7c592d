"""Draws a run's figures into its folder."""

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.random as jr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jepax.data import DataConfig, batches, open_source
from jepax.health import alerts
from jepax.io import logger
from jepax.types import ImageBatch
from jepax.viz.curves import plot_curves
from jepax.viz.masks import Masked, make_masked_examples, plot_masks
from jepax.viz.views import Viewed, plot_views

NUM_IMAGES = 8
"""Rows of a sheet."""


@runtime_checkable
class Drawable(Protocol):
    """What the figures read of a run's config."""

    method: Any
    data: DataConfig
    seed: int


def draw_figures(config: Drawable, run: Path) -> list[Path]:
    """Draws what the run has into `run`/figures and returns the files, each written whole or not at all.

    - curves.png: every metric over the steps and the watchdog's alarms, if `metrics.jsonl` has a line.
    - masks.png: the run's first images as its first step sees them, if the method masks.
    - views.png: all views of the run's first images in its first step, if the method compares views.

    Raises `UserError` where the data cannot be read.
    """
    drawn = {}
    lines = logger.read_metrics(run / logger.METRICS_FILE)
    if lines:
        drawn["curves.png"] = plot_curves(lines, run.resolve().name, alerts.load_alerts(run))
    # The key of step 0, as `train.train` and `train.train_step` derive it from the seed.
    key = jr.fold_in(jr.fold_in(jr.key(config.seed), 1), 0)
    if isinstance(config.method, Masked):
        drawn["masks.png"] = plot_masks(make_masked_examples(config.method, load_first_images(config), key))
    if isinstance(config.method, Viewed):
        drawn["views.png"] = plot_views(config.method, load_first_images(config), key)
    return [save_figure(figure, run / "figures" / name) for name, figure in drawn.items()]


def load_first_images(config: Drawable) -> ImageBatch:
    """The first images of the run's order."""
    source = open_source(config.data, "train")
    return next(batches(source, batch_size=NUM_IMAGES, steps=1, seed=config.seed, threads=0))


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    FigureCanvasAgg(figure).print_png(part)
    os.replace(part, path)
    return path
