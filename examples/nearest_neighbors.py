"""Draw what a run has learned: images, the patches that its encoder sees in training, and nearest neighbors.

    python examples/nearest_neighbors.py runs/ijepa_fashion_mnist neighbors.png

Neighbors of a validation image are the training images with the largest cosine similarity of the mean over patches, by
the untrained encoder and by the trained one. For runs of I-JEPA and its variants.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jepax.data import batches, open_source
from jepax.methods.base import example_keys
from jepax.training.evaluation import load_run_config, load_state, target_from_run
from jepax.training.setup import init_method
from jepax.types import ImageBatch
from jepax.views import CropConfig, center_crop, denormalize
from jepax.viz.sheets import blank_hidden_patches, masked_examples

ROWS, NEIGHBORS, GALLERY = 6, 4, 6000
Columns = list[tuple[str, np.ndarray]]
"""Title and images, one per row, of each column."""


def neighbor_columns(
    name: str, encoder: Callable[..., jax.Array], queries: ImageBatch, gallery: ImageBatch, crop: CropConfig
) -> Columns:
    """The images of the gallery that are nearest to each query, nearest first."""

    # The unit vector of each image: the mean over patches of the center view.
    @eqx.filter_jit
    def embed(encoder, batch):
        z = jnp.mean(encoder(center_crop(batch, crop)), axis=1)  # (B, D)
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    similarity = np.asarray(embed(encoder, queries) @ embed(encoder, gallery).T)  # (rows, gallery)
    nearest = pixels(gallery, crop)[np.argsort(-similarity, axis=1)[:, :NEIGHBORS]]
    return [(f"{name} {number + 1}", nearest[:, number]) for number in range(nearest.shape[1])]


def pixels(batch: ImageBatch, crop: CropConfig) -> np.ndarray:
    """Center views with values in [0, 1]."""
    return np.asarray(denormalize(center_crop(batch, crop), crop))


def draw(columns: Columns) -> Figure:
    """One row per image."""
    rows = len(columns[0][1])
    figure = Figure(figsize=(len(columns) * 0.9, rows * 0.92 + 0.2), dpi=110, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=7)
        for cell, image in zip(axes[:, column], images, strict=True):
            cell.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
            cell.set_axis_off()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("file", type=Path, help="image file to write")
    args = parser.parse_args(argv)

    # The trained encoder, the same one before its first step, and images of both splits.
    config = load_run_config(args.run)
    target = target_from_run(config, load_state(config, args.run), args.run)
    (gallery,) = batches(open_source(config.data, "train"), batch_size=GALLERY, steps=1, seed=0)
    (queries,) = batches(open_source(config.data, "validation"), batch_size=ROWS, steps=1, seed=1)

    # The patches that the context encoder sees of one random view.
    method = init_method(config.method, 1, jr.key(config.seed))
    views = eqx.filter_jit(method.draw)(queries, example_keys(jr.key(0), queries.index))
    seen = masked_examples(views, method.masks.grid, target.crop)
    context = [blank_hidden_patches(*pair) for pair in zip(seen.pixels, seen.context, strict=True)]

    columns = [("image", pixels(queries, target.crop)), ("context", np.stack(context))]
    columns += neighbor_columns("untrained", target.untrained, queries, gallery, target.crop)
    columns += neighbor_columns("trained", target.trained, queries, gallery, target.crop)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(draw(columns)).print_png(args.file)
    print(args.file)


if __name__ == "__main__":
    main()
