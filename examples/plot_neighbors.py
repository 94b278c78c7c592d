"""Draw what a run learned: images, their masks, and their nearest neighbors by the trained and the untrained encoder.

    python examples/plot_neighbors.py runs/ijepa_fashion_mnist docs/figures/demo.png

Neighbors are the training images with the largest cosine similarity of the encoder's mean token.
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jepax.commands.evaluation import load_run_config, load_state, target_from_run
from jepax.data import batches, open_source
from jepax.methods.base import example_keys
from jepax.training.setup import init_method
from jepax.views import center_crop, denormalize
from jepax.viz.masks import blank_hidden_patches, masked_examples

ROWS, NEIGHBORS, GALLERY = 6, 4, 6000
run, path = Path(sys.argv[1]), Path(sys.argv[2])

# A trained encoder, the same one before its first step, and images of the training and the validation split.
config = load_run_config(run)
target = target_from_run(config, load_state(config, run), run)
(gallery,) = batches(open_source(config.data, "train"), batch_size=GALLERY, steps=1, seed=0)
(queries,) = batches(open_source(config.data, "validation"), batch_size=ROWS, steps=1, seed=1)
gallery, queries = (jax.tree.map(jnp.asarray, batch) for batch in (gallery, queries))


# The unit vector of each image: the mean of its tokens in the center view.
@eqx.filter_jit
def embed(encoder, batch):
    z = jnp.mean(encoder(center_crop(batch, target.crop)), axis=1)  # (B, D)
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def pixels(batch):
    return np.asarray(denormalize(center_crop(batch, target.crop), target.crop))


def nearest(encoder):
    similarity = embed(encoder, queries) @ embed(encoder, gallery).T  # (rows, gallery)
    return pixels(gallery)[np.argsort(-np.asarray(similarity), axis=1)[:, :NEIGHBORS]]


# What the encoder sees in training: a few patches of a view.
method = init_method(config.method, 1, jr.key(config.seed))
views = eqx.filter_jit(method.draw)(queries, example_keys(jr.key(0), queries.index))
seen = masked_examples(views, method.masks.grid, target.crop)

# One row per image: image, context patches, neighbors by the untrained and by the trained encoder.
context = [blank_hidden_patches(*pair) for pair in zip(seen.pixels, seen.context, strict=True)]
columns = [("image", pixels(queries)), ("context", context)]
for name, encoder in (("untrained", target.untrained), ("trained", target.trained)):
    found = nearest(encoder)
    columns += [(f"{name} {number + 1}", found[:, number]) for number in range(NEIGHBORS)]
figure = Figure(figsize=(len(columns) * 0.9, ROWS * 0.92 + 0.2), dpi=110, layout="constrained")
axes = figure.subplots(ROWS, len(columns), squeeze=False)
for column, (title, images) in enumerate(columns):
    axes[0, column].set_title(title, fontsize=7)
    for row, image in enumerate(images):
        axes[row, column].imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
        axes[row, column].set_axis_off()
path.parent.mkdir(parents=True, exist_ok=True)
FigureCanvasAgg(figure).print_png(path)
print(path)
