"""Frozen features: run an encoder over a split once, keep the result on the host, score what is predicted from it."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jepax.types import AnyArray, Array, Float, Images, Int, UserError

Embed = Callable[[Images], Float[Array, "layers batch dim"]]
"""An encoder for evaluation: mean-pooled patches of the last (up to four) layers, the very last one at the end."""


MISS = np.iinfo(np.int32).max
"""The rank of a class that was not named at all: no hit among any number of guesses."""


@dataclass(frozen=True)
class Scores:
    """Accuracy in percent of the examples."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Features:
    """Features of one split, float32 on the host.

    **Raises** `UserError` where a value is not finite: every accuracy read from such features would be meaningless.
    """

    layers: Float[np.ndarray, "layers n dim"]
    labels: Int[np.ndarray, "n"]

    def __post_init__(self):
        if not all(np.isfinite(layer).all() for layer in self.layers):
            raise UserError(
                "features are not finite: the encoder has diverged or its input holds NaN.\n"
                "Look at the loss in metrics.jsonl and evaluate an earlier checkpoint."
            )

    @property
    def last(self) -> Float[np.ndarray, "n dim"]:
        """The last layer."""
        return self.layers[-1]

    @property
    def concatenated(self) -> Float[np.ndarray, "n wide"]:
        """The last four layers side by side, or as many as there are."""
        return np.concatenate(self.layers[-4:], axis=1)


def extract(
    embed: Embed, batches: Iterable[tuple[Images, int]], progress: Callable[[int, float], None] | None = None
) -> Features:
    """Embed every example of a sweep.

    `embed` is compiled once, since batches share one shape. Give it as an Equinox module or `eqx.Partial`: the arrays
    of a plain closure would be compiled in as constants. It does not see the labels.

    - `batches`: pairs of a batch and the number of its valid examples; the rest, at the end of the batch, is padding.
    - `progress`: called after each batch with the number of examples done and the seconds since the start.

    **Raises** `UserError` if the sweep is empty or has no labels.
    """
    run, start, done = eqx.filter_jit(embed), time.perf_counter(), 0
    layers, labels, waiting = [], [], None
    for images, valid in batches:
        labels.append(_labels(images)[:valid])
        ahead = (run(dataclasses.replace(images, label=None)), valid)
        if waiting is not None:  # fetched one batch late, so that the device works while the host copies
            layers.append(_fetch(*waiting))
        waiting, done = ahead, done + valid
        if progress is not None:
            progress(done, time.perf_counter() - start)
    if waiting is None:
        raise UserError("no batches to extract features from: the split is empty; choose another split or source")
    return Features(np.concatenate([*layers, _fetch(*waiting)], axis=1), np.concatenate(labels))


def _fetch(output: Float[Array, "layers batch dim"], valid: int) -> Float[np.ndarray, "layers valid dim"]:
    return np.asarray(output, dtype=np.float32)[:, :valid]


def _labels(images: Images) -> Int[np.ndarray, "batch"]:
    if images.label is None:
        raise UserError("evaluation needs labels, and this source has none (label=None); choose a labelled source")
    return np.asarray(images.label, dtype=np.int32)


def check_labels(labels: Int[AnyArray, "n"], classes: int, split: str) -> None:
    """**Raises** `UserError` unless the split has examples and every label lies in [0, classes)."""
    if len(labels) == 0:
        raise UserError(f"the {split} split has no examples; choose another split or source")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"labels of the {split} split run from {low} to {high}, outside [0, classes={classes}); set classes to the "
            "number of classes, and number them from 0"
        )


def rank_of_label(values: Float[AnyArray, "n classes"], labels: Int[AnyArray, "n"]) -> Int[Array, "n"]:
    """How many classes come before the right one, by value and then by class number: 0 is a top-1 hit.

    Where the right class's value is NaN the rank is `MISS`, so a diverged head never scores.
    """
    right = jnp.take_along_axis(values, labels[:, None], axis=1)
    smaller_number = jnp.arange(values.shape[1]) < labels[:, None]
    before = ~(values <= right) | ((values == right) & smaller_number)
    return jnp.where(jnp.isnan(right[:, 0]), MISS, before.sum(1))


def scores(ranks: Int[AnyArray, "n"]) -> Scores:
    """Top-1 and top-5 in percent from the ranks of the right classes."""
    ranks = np.asarray(ranks)
    return Scores(*(100 * int((ranks < k).sum()) / len(ranks) for k in (1, 5)))
