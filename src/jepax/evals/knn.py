"""Weighted k-nearest-neighbour classification of frozen features: exact, and nothing is trained."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.scoring import FittedProbe, TopKPredictions, check_labels, topk_classes
from jepax.types import AnyArray, Array, Float, Int, PRNGKeyArray, UserError


@dataclass(frozen=True)
class KnnConfig:
    """How many vote and how sharply: validation chooses among every k with every temperature."""

    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    """k, the voters of a query; those above the number of training examples are left out."""
    temperatures: tuple[float, ...] = (0.03, 0.07, 0.2)
    """T of the vote exp(similarity / T); 0.07 is Wu et al.'s."""
    chunk: int = 256
    """Queries compared with all keys at once; memory is chunk x keys x 4 bytes."""

    def __post_init__(self):
        if not self.neighbours or min(self.neighbours) < 1:
            raise UserError(f"neighbours={self.neighbours} must hold at least one number, none below 1")
        if not self.temperatures or not min(self.temperatures) > 0:
            raise UserError(f"temperatures={self.temperatures} must hold at least one number, all above 0")
        if self.chunk < 1:
            raise UserError(f"chunk={self.chunk} must be at least 1")


@dataclass(frozen=True, eq=False)
class KnnIndex:
    """The training examples, placed on the device once."""

    features: Float[Array, "keys dim"]
    length: Float[Array, "keys"]
    labels: Int[np.ndarray, "keys"]
    """On the host, where votes are counted."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest keys of some queries, the nearest first."""

    similarity: Float[np.ndarray, "queries k"]
    labels: Int[np.ndarray, "queries k"]


def knn(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: KnnConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """Neighbours in the last layer's features; the training examples vote. `key` is not used: nothing is drawn.

    One search per query, of the largest k, serves every k and temperature. The first of equally good ones is chosen.

    **Raises** `UserError` if every k is above the number of training examples, or a label is out of range.
    """
    check_labels(train.labels, classes, "train")
    check_labels(validation.labels, classes, "validation")
    possible = [k for k in config.neighbours if k <= len(train)]
    if not possible:
        raise UserError(
            f"neighbours={config.neighbours} are all more than the {len(train)} training examples; lower one of them"
        )
    keys, most = build_index(train.features.last, train.labels), max(possible)
    pairs = list(itertools.product(possible, config.temperatures))
    right = np.zeros(len(pairs))
    with say.counting("kNN", len(validation)) as done:
        for rows, found in search(keys, validation.features.last, most, config.chunk):
            truth = validation.labels[rows]
            right += [np.sum(count_votes(found, classes, *pair).argmax(axis=1) == truth) for pair in pairs]
            done(rows.stop)
    tried = [
        {"neighbours": k, "temperature": t, "validation_top1": 100 * float(hits) / len(validation)}
        for (k, t), hits in zip(pairs, right, strict=True)
    ]
    chosen = max(tried, key=lambda one: one["validation_top1"])
    k, temperature = chosen["neighbours"], chosen["temperature"]

    def guess(split: EvalDataset) -> TopKPredictions:
        parts = search(keys, split.features.last, most, config.chunk)
        return np.concatenate([topk_classes(count_votes(found, classes, k, temperature)) for _, found in parts])

    return [FittedProbe("kNN", guess, chosen, f"k {k}, temperature {temperature:g}", tried)]


def count_votes(
    found: Neighbors, classes: int, neighbours: int, temperature: float
) -> Float[np.ndarray, "queries classes"]:
    """By class, the sum of the votes exp(s / T) of the k nearest; -inf without a vote, so that it is not named.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.

    The nearest's similarity is taken from all of a query's: that changes no share and cannot overflow.
    """
    near = found.similarity[:, :neighbours].astype(np.float64)
    weights = np.exp((near - near[:, :1]) / temperature)
    cell = found.labels[:, :neighbours] + classes * np.arange(len(near))[:, None]
    sums = np.bincount(cell.ravel(), weights.ravel(), len(near) * classes).reshape(-1, classes)
    return np.where(sums > 0, sums, -np.inf).astype(np.float32)


def build_index(features: Float[AnyArray, "keys dim"], labels: Int[np.ndarray, "keys"]) -> KnnIndex:
    """Puts the keys on the device."""
    on_device = jnp.asarray(features)
    return KnnIndex(on_device, _row_norms(on_device), np.asarray(labels))


def search(
    keys: KnnIndex, queries: Float[AnyArray, "queries dim"], neighbours: int, chunk: int
) -> Iterator[tuple[slice, Neighbors]]:
    """The rows of each chunk of queries, and what is nearest to them: never more than chunk x keys similarities.

    The last chunk is padded, so one program serves any number of queries.
    """
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
        nearest = jax.device_get(_nearest_neighbors(keys.features, keys.length, padded, neighbours))
        similarity, index = (array[: len(part)] for array in nearest)
        yield slice(start, start + len(part)), Neighbors(similarity, keys.labels[index])


@partial(jax.jit, static_argnames="neighbours")
def _nearest_neighbors(
    features: Float[AnyArray, "keys dim"],
    length: Float[AnyArray, "keys"],
    queries: Float[AnyArray, "queries dim"],
    neighbours: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """s = q.k / (|q| |k|) of the nearest keys, in float32 at full precision on every device, and their numbers.

    Equally near ones go by number.
    """
    product = jnp.einsum("qd,kd->qk", queries, features, precision=lax.Precision.HIGHEST)
    values, index = lax.top_k(product / _row_norms(queries)[:, None] / length, neighbours)
    return values, index


@jax.jit
def _row_norms(rows: Float[AnyArray, "n dim"]) -> Float[Array, "n"]:
    length = jnp.linalg.norm(rows, axis=1)
    return jnp.where(length > 0, length, 1)
