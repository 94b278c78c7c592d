"""Draws a run's figures into its folder."""

import os
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PyTree
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jepax.data import batches, open_source
from jepax.health import alerts
from jepax.io import logger
from jepax.methods.base import example_keys
from jepax.training.config import Config
from jepax.types import ClipBatch, ImageBatch
from jepax.views import MaskedViews, MultiCropViews
from jepax.viz.curves import plot_curves
from jepax.viz.sheets import masked_examples, plot_masks, plot_views

NUM_IMAGES = 8
"""Number of images on a sheet."""


def draw_figures(config: Config, run: Path) -> list[Path]:
    """Draw the run's figures into `run`/figures, each atomically, and return their paths.

    - curves.png: every metric over the steps and the watchdog's alarms, if `metrics.jsonl` has an entry.
    - masks.png: the run's first images as its first step sees them, if the method draws masks.
    - views.png: all views of the run's first images in its first step, if the method draws several.

    Raises `UserError` if the data cannot be read.
    """
    figures = {}
    lines = logger.read_metrics(run / logger.METRICS_FILE)
    if lines:
        figures["curves.png"] = plot_curves(lines, run.resolve().name, alerts.load_alerts(run))
    images = load_first_images(config)
    match first_views(config, images):  # the type of the views decides, whatever the method
        case MaskedViews() as views:
            grid = config.method.encoder.grid(views.image.shape[1:3])
            figures["masks.png"] = plot_masks(masked_examples(views, grid, config.method.crop))
        case MultiCropViews() as views:
            figures["views.png"] = plot_views(views, images, config.method.crop)
    return [save_figure(figure, run / "figures" / name) for name, figure in figures.items()]


def load_first_images(config: Config) -> ImageBatch | ClipBatch:
    """Load the first images, or clips, in the run's order."""
    source = open_source(config.data, "train")
    return next(batches(source, batch_size=NUM_IMAGES, steps=1, seed=config.seed, num_threads=0))


def first_views(config: Config, images: ImageBatch | ClipBatch) -> PyTree:
    """Draw the views of these images as the run's first step does; no network is built."""
    # The key of step 0, derived from the seed as in training.
    key = jr.fold_in(jr.fold_in(jr.key(config.seed), 1), 0)
    method = eqx.filter_eval_shape(lambda: config.method.build(total_steps=1, key=jr.key(0)))
    return jax.jit(lambda images, keys: method.draw(images, keys))(images, example_keys(key, images.index))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically."""
    return save_atomically(path, FigureCanvasAgg(figure).print_png)


def save_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a path next to this one, and then replace this file by what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    write(part)
    os.replace(part, path)
    return path
