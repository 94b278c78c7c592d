"""Plots training images as a multi-view method sees them: every view, at its own size."""

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jepax.types import ImageBatch
from jepax.views import CropConfig, MultiCropViews, center_crop, denormalize

CELL_INCHES, DPI = 1.3, 120
"""Width of one image on the sheet in inches, and pixels per inch."""


def plot_views(views: MultiCropViews, images: ImageBatch, crop: CropConfig) -> Figure:
    """Plot one row per image: the center view that probes use, then every view drawn from it."""
    center = jax.jit(lambda images: center_crop(images, crop))(images)
    columns = [("center", center)]
    for name, group in zip(("global", "local"), views.groups, strict=False):
        columns += [(name, group[:, view]) for view in range(group.shape[1])]
    rows = len(center)
    figure = Figure(figsize=(len(columns) * CELL_INCHES, rows * CELL_INCHES + 0.3), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, column_views) in enumerate(columns):
        height, width = column_views.shape[1:3]
        axes[0, column].set_title(f"{name}: {height} \u00d7 {width} px", fontsize=7, pad=2)
        for row, pixels in enumerate(np.asarray(denormalize(column_views, crop))):
            _draw_view(axes[row, column], np.broadcast_to(pixels, (height, width, 3)))
    return figure


def _draw_view(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest" if pixels.shape[1] <= CELL_INCHES * DPI else "antialiased")
    axes.set_axis_off()
