"""Plots training images as the networks see them: a masked view and its patches, or several views of each image."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from jepax.types import ImageBatch
from jepax.views import CropConfig, MaskedViews, MultiCropViews, center_crop, denormalize

HIDDEN_PATCH_COLOR = (0.78, 0.81, 0.86)
"""Color of a hidden patch: a bluish gray, which no gray image contains."""
COLORS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Outline colors of the target blocks, repeated if there are more; safe for the color-blind (Okabe, Ito)."""
MASK_INCHES, VIEW_INCHES, DPI = 1.6, 1.3, 120
"""Width of one image on either sheet in inches, and pixels per inch."""


class MaskedExamples(NamedTuple):
    """Images, and the patches that each network sees."""

    pixels: Float[np.ndarray, "batch height width 3"]
    """Values in [0, 1]; gray is repeated."""
    context: Bool[np.ndarray, "batch rows columns"]
    targets: Bool[np.ndarray, "batch blocks rows columns"]


def masked_examples(views: MaskedViews, grid: tuple[int, int], crop: CropConfig) -> MaskedExamples:
    """Convert views and masks, as drawn, to pixel values and marked patches of the grid."""
    pixels, masks = np.asarray(denormalize(views.image, crop)), views.masks
    context = np.stack([_patch_mask(indices, grid) for indices in np.asarray(masks.context)])
    targets, valid = np.asarray(masks.targets), np.asarray(masks.target_valid)
    blocks = [
        [_patch_mask(block[real], grid) for block, real in zip(*image, strict=True)]
        for image in zip(targets, valid, strict=True)
    ]
    return MaskedExamples(np.broadcast_to(pixels, (*pixels.shape[:3], 3)), context, np.asarray(blocks))


def _patch_mask(indices: Int[np.ndarray, "patches"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    marked = np.zeros(grid[0] * grid[1], bool)
    marked[indices] = True
    return marked.reshape(grid)


def plot_masks(images: MaskedExamples) -> Figure:
    """Plot one row per image: its view with the targets outlined, its context, and each target block."""
    rows, blocks = images.targets.shape[:2]
    height, width = images.pixels.shape[1:3]
    figure, axes = make_sheet(rows, blocks + 2, MASK_INCHES, MASK_INCHES * height / width + 0.22)
    for (full, seen, *cells), pixels, context, targets in zip(axes, *images, strict=True):
        _draw_patches(full, pixels, np.ones_like(context), f"view: {height} \u00d7 {width} px")
        _draw_patches(seen, pixels, context, f"context: {context.sum()} of {context.size} patches")
        for number, (cell, target) in enumerate(zip(cells, targets, strict=True)):
            _draw_patches(cell, pixels, target, f"target {number + 1}: {target.sum()} patches")
            for outlined in (full, cell):
                _draw_outline(outlined, target, (height, width), COLORS[number % len(COLORS)])
    return figure


def plot_views(views: MultiCropViews, images: ImageBatch, crop: CropConfig) -> Figure:
    """Plot one row per image: the center view that probes use, then every view drawn from it, at its own size."""
    center = jax.jit(lambda images: center_crop(images, crop))(images)
    columns = [("center", center)]
    for name, group in zip(("global", "local"), views.groups, strict=False):
        columns += [(name, group[:, view]) for view in range(group.shape[1])]
    figure, axes = make_sheet(len(center), len(columns), VIEW_INCHES, VIEW_INCHES)
    for column, (name, column_views) in enumerate(columns):
        height, width = column_views.shape[1:3]
        axes[0, column].set_title(f"{name}: {height} \u00d7 {width} px", fontsize=7, pad=2)
        for cell, pixels in zip(axes[:, column], np.asarray(denormalize(column_views, crop)), strict=True):
            draw_image(cell, np.broadcast_to(pixels, (height, width, 3)), VIEW_INCHES)
    return figure


def make_sheet(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure, and its cells of this width and height in inches."""
    figure = Figure(figsize=(columns * width, rows * height + 0.3), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_image(axes: Axes, pixels: Float[np.ndarray, "height width 3"], inches: float) -> None:
    height, width = pixels.shape[:2]
    interpolation = "nearest" if width <= inches * DPI else "antialiased"
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation=interpolation)
    axes.set_axis_off()


def _draw_patches(
    axes: Axes, pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"], title: str
) -> None:
    draw_image(axes, blank_hidden_patches(pixels, patches), MASK_INCHES)
    axes.set_title(title, fontsize=8, pad=2)


def blank_hidden_patches(
    pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "height width 3"]:
    """Fill every patch that is not marked with `HIDDEN_PATCH_COLOR`."""
    patch = tuple(side // count for side, count in zip(pixels.shape, patches.shape, strict=False))
    shown = np.kron(patches, np.ones(patch, bool))
    return np.where(shown[:, :, None], pixels, np.float32(HIDDEN_PATCH_COLOR))


def _draw_outline(axes: Axes, patches: Bool[np.ndarray, "rows columns"], size: tuple[int, int], color: str) -> None:
    """Draw the border of the marked patches, over a wider white one that separates it from the image."""
    scale = np.array([size[1] / patches.shape[1], size[0] / patches.shape[0]])
    segments, style = patch_borders(patches) * scale, {"capstyle": "projecting", "clip_on": False}
    for line_width, line_color in ((3.2, "white"), (1.8, color)):
        lines = LineCollection(segments, linewidths=line_width, colors=line_color, **style)
        axes.add_collection(lines, autolim=False)


def patch_borders(patches: Bool[np.ndarray, "rows columns"]) -> Float[np.ndarray, "segments 2 2"]:
    """Endpoints (column, row) of the patch edges with a marked patch on exactly one side."""
    padded = np.pad(patches, 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    across = np.stack([column, row, column + 1, row], axis=1)
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    down = np.stack([column, row, column, row + 1], axis=1)
    return np.concatenate([across, down]).reshape(-1, 2, 2).astype(float)
