"""A sheet of training images as the networks see them: the view, the context's patches, and each target block."""

from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from jepax.masking import MultiBlock
from jepax.types import ImageBatch, Masks
from jepax.views import CropConfig, denormalize

HIDDEN_PATCH_COLOR = (0.78, 0.81, 0.86)
"""Stands where a patch is not seen: a bluish grey, which no grey picture holds."""
TARGET_COLORS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Outlines of target blocks, in their order, then from the first again; safe for the colour-blind (Okabe, Ito)."""
CELL_INCHES, DPI = 1.6, 120
"""Width of one picture on the sheet in inches, and pixels per inch."""


@runtime_checkable
class Masked(Protocol):
    """Settings of a method that masks, as `methods.IJEPAConfig` has them."""

    crop: CropConfig

    def sampler(self) -> MultiBlock:
        """The sampler of masks."""

    def views_and_masks(self, images: ImageBatch, sampler: MultiBlock, *, key: PRNGKeyArray) -> tuple[Array, Masks]:
        """The training step's own draw."""


class MaskedExamples(NamedTuple):
    """Pictures, and which of their patches each network sees."""

    pixels: Float[np.ndarray, "batch height width 3"]
    """Values in [0, 1]; grey is repeated."""
    context: Bool[np.ndarray, "batch rows columns"]
    targets: Bool[np.ndarray, "batch blocks rows columns"]


def make_masked_examples(method: Masked, images: ImageBatch, key: PRNGKeyArray) -> MaskedExamples:
    """What a training step with this key makes of the images; no network is built."""
    sampler = method.sampler()
    view, masks = eqx.filter_jit(method.views_and_masks)(images, sampler, key=key)
    pixels = np.asarray(denormalize(view, method.crop))
    context = np.stack([_patch_mask(indices, sampler.grid) for indices in np.asarray(masks.context)])
    targets, valid = np.asarray(masks.targets), np.asarray(masks.target_valid)
    blocks = [
        [_patch_mask(block[real], sampler.grid) for block, real in zip(*image, strict=True)]
        for image in zip(targets, valid, strict=True)
    ]
    return MaskedExamples(np.broadcast_to(pixels, (*pixels.shape[:3], 3)), context, np.asarray(blocks))


def blank_hidden_patches(
    pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"]
) -> Float[np.ndarray, "height width 3"]:
    """The picture with `BLANK` in place of every patch that is not marked."""
    patch = tuple(side // count for side, count in zip(pixels.shape, patches.shape, strict=False))
    shown = np.kron(patches, np.ones(patch, bool))
    return np.where(shown[:, :, None], pixels, np.float32(HIDDEN_PATCH_COLOR))


def plot_masks(images: MaskedExamples) -> Figure:
    """One row per image: its view with the targets outlined, its context, and each of its target blocks."""
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
        colour = TARGET_COLORS[number % len(TARGET_COLORS)]
        _draw_cell(axes[number + 2], pixels, target, f"target {number + 1}: {target.sum()} patches")
        for cell in (axes[0], axes[number + 2]):
            _draw_outline(cell, target, pixels.shape, colour)


def _draw_cell(
    axes: Axes, pixels: Float[np.ndarray, "height width 3"], patches: Bool[np.ndarray, "rows columns"], title: str
) -> None:
    height, width = pixels.shape[:2]
    interpolation = "nearest" if width <= CELL_INCHES * DPI else "antialiased"
    axes.imshow(blank_hidden_patches(pixels, patches), extent=(0, width, height, 0), interpolation=interpolation)
    axes.set_title(title, fontsize=8, pad=2)
    axes.set_axis_off()


def _draw_outline(axes: Axes, patches: Bool[np.ndarray, "rows columns"], shape: tuple[int, ...], colour: str) -> None:
    """The border of the marked patches, whatever their form, over a white one that parts it from the picture."""
    scale = np.array([shape[1] / patches.shape[1], shape[0] / patches.shape[0]])
    for line_width, line_colour in ((3.2, "white"), (1.8, colour)):
        segments = LineCollection(
            _patch_borders(patches) * scale,
            linewidths=line_width,
            colors=line_colour,
            capstyle="projecting",
            clip_on=False,
        )
        axes.add_collection(segments, autolim=False)


def _patch_borders(patches: Bool[np.ndarray, "rows columns"]) -> Float[np.ndarray, "segments 2 2"]:
    """Ends (column, row) of the patch sides that have a marked patch on one side only."""
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
