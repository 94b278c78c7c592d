"""A sheet of training images as a method that compares views sees them: every view, at its own size."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jepax.types import ImageBatch
from jepax.views import MultiCropConfig, center_crop, denormalize
from jepax.views import ViewGroup as Group

CELL_INCHES, DPI = 1.3, 120
"""Width of one picture on the sheet in inches, and pixels per inch."""


@runtime_checkable
class Viewed(Protocol):
    """Settings of a method that compares views, as `methods.multiview.MultiViewConfig` has them."""

    views: MultiCropConfig

    def draw_views(self, images: ImageBatch, *, key: PRNGKeyArray) -> tuple[Group, ...]:
        """The training step's own views."""


def plot_views(method: Viewed, images: ImageBatch, key: PRNGKeyArray) -> Figure:
    """One row per image: the centre view that probes read, then the views of a step with this key; no network."""
    crop = method.views.global_crop
    groups = eqx.filter_jit(method.draw_views)(images, key=key)
    centre = jax.jit(lambda images: center_crop(images, crop))(images)
    names = [("global", "local")[group] for group, views in enumerate(groups) for _ in views]
    columns = [("centre", centre), *zip(names, (view for group in groups for view in group), strict=True)]
    rows = len(centre)
    figure = Figure(figsize=(len(columns) * CELL_INCHES, rows * CELL_INCHES + 0.3), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, views) in enumerate(columns):
        height, width = views.shape[1:3]
        axes[0, column].set_title(f"{name}: {height} \u00d7 {width} px", fontsize=7, pad=2)
        for row, pixels in enumerate(np.asarray(denormalize(views, crop))):
            _draw_view(axes[row, column], np.broadcast_to(pixels, (height, width, 3)))
    return figure


def _draw_view(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest" if pixels.shape[1] <= CELL_INCHES * DPI else "antialiased")
    axes.set_axis_off()
