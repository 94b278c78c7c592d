"""Plots training images as the networks see them: the view, the context's patches, and each target block."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from jepax.views import CropConfig, MaskedViews, denormalize

HIDDEN_PATCH_COLOR = (0.78, 0.81, 0.86)
"""Color of a hidden patch: a bluish gray, which no gray image contains."""
COLORS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Outline colors of the target blocks, repeated if there are more; safe for the color-blind (Okabe, Ito)."""
CELL_INCHES, DPI = 1.6, 120
"""Width of one image on the sheet in inches, and pixels per inch."""


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


def blank_hidden_patches(
    pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "height width 3"]:
    """Fill every patch that is not marked with `HIDDEN_PATCH_COLOR`."""
    patch = tuple(side // count for side, count in zip(pixels.shape, patches.shape, strict=False))
    shown = np.kron(patches, np.ones(patch, bool))
    return np.where(shown[:, :, None], pixels, np.float32(HIDDEN_PATCH_COLOR))


def plot_masks(images: MaskedExamples) -> Figure:
    """Plot one row per image: its view with the targets outlined, its context, and each target block."""
    rows, blocks = images.targets.shape[:2]
    height, width = images.pixels.shape[1:3]
    size = ((blocks + 2) * CELL_INCHES, rows * (CELL_INCHES * height / width + 0.22) + 0.3)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(rows, blocks + 2, squeeze=False)
    for row, *image in zip(axes, *images, strict=True):
        _draw_row(row, *image)
    return figure


def _draw_row(
    axes: np.ndarray,
    pixels: Float[np.ndarray, "height width 3"],
    context: Bool[np.ndarray, "rows columns"],
    targets: Bool[np.ndarray, "blocks rows columns"],
) -> None:
    height, width = pixels.shape[:2]
    _draw_cell(axes[0], pixels, np.ones_like(context), f"view: {height} \u00d7 {width} px")
    _draw_cell(axes[1], pixels, context, f"context: {context.sum()} of {context.size} patches")
    for number, target in enumerate(targets):
        color = COLORS[number % len(COLORS)]
        _draw_cell(axes[number + 2], pixels, target, f"target {number + 1}: {target.sum()} patches")
        for cell in (axes[0], axes[number + 2]):
            _draw_outline(cell, target, pixels.shape, color)


def _draw_cell(
    axes: Axes, pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"], title: str
) -> None:
    height, width = pixels.shape[:2]
    interpolation = "nearest" if width <= CELL_INCHES * DPI else "antialiased"
    axes.imshow(blank_hidden_patches(pixels, patches), extent=(0, width, height, 0), interpolation=interpolation)
    axes.set_title(title, fontsize=8, pad=2)
    axes.set_axis_off()


def _draw_outline(axes: Axes, patches: Bool[np.ndarray, "rows columns"], shape: tuple[int, ...], color: str) -> None:
    """Draw the border of the marked patches, over a wider white one that separates it from the image."""
    scale = np.array([shape[1] / patches.shape[1], shape[0] / patches.shape[0]])
    for line_width, line_color in ((3.2, "white"), (1.8, color)):
        segments = LineCollection(
            _patch_borders(patches) * scale,
            linewidths=line_width,
            colors=line_color,
            capstyle="projecting",
            clip_on=False,
        )
        axes.add_collection(segments, autolim=False)


def _patch_borders(patches: Bool[np.ndarray, "rows columns"]) -> Float[np.ndarray, "segments 2 2"]:
    """Endpoints (column, row) of the patch edges with a marked patch on exactly one side."""
    padded = np.pad(patches, 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    across = np.stack([column, row, column + 1, row], axis=1)
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    down = np.stack([column, row, column, row + 1], axis=1)
    return np.concatenate([across, down]).reshape(-1, 2, 2).astype(float)


def _patch_mask(indices: Int[np.ndarray, "patches"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    marked = np.zeros(grid[0] * grid[1], bool)
    marked[indices] = True
    return marked.reshape(grid)
