"""Weighted k-nearest-neighbor classification of frozen features: exact, and nothing is trained."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jepax.evals.checks import field_check
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.programs import eval_jit
from jepax.evals.scoring import FittedProbe, ProtocolData, TopKPredictions, best_trial, topk
from jepax.types import AnyArray, Array, Float, Int, UserError


@dataclass(frozen=True)
class KnnConfig:
    """Number and sharpness of the votes: validation chooses among every k with every temperature."""

    k: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 200)
    """k, the number of voters; those above the number of training examples are left out."""
    temperatures: tuple[float, ...] = (0.03, 0.07, 0.2)
    """T of the vote exp(similarity / T); Wu et al. use 0.07."""
    query_chunk: int = 256
    """Queries compared with all training examples at a time; memory is chunk x examples x 4 bytes."""

    def __post_init__(self):
        check, ks, temperatures = field_check("knn", self), self.k, self.temperatures
        check("k", len(ks) > 0 and min(ks) >= 1, "at least one number, none below 1")
        check("temperatures", len(temperatures) > 0 and min(temperatures) > 0, "at least one number, all above 0")
        check("query_chunk", self.query_chunk >= 1, "at least 1 query")


@dataclass(frozen=True, eq=False)
class KnnIndex:
    """The training examples: features on the device, labels on the host, where votes are counted."""

    features: Float[Array, "keys dim"]
    norms: Float[np.ndarray, "keys"]
    labels: Int[np.ndarray, "keys"]

    @classmethod
    def build(cls, features: Float[np.ndarray, "keys dim"], labels: Int[np.ndarray, "keys"]) -> "KnnIndex":
        return cls(jax.device_put(features), _norms(features), np.asarray(labels))


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest training examples of some queries, nearest first."""

    similarity: Float[np.ndarray, "queries k"]
    labels: Int[np.ndarray, "queries k"]


def knn(data: ProtocolData, config: KnnConfig) -> list[FittedProbe]:
    """Classifies by the nearest training examples in the last layer's features.

    One search per query, with the largest k, serves every k and temperature. The first of several equal ones is chosen.

    **Raises** `UserError` if every k is above the number of training examples.
    """
    # With k above the number of training examples there is no k-th neighbor.
    train, validation, classes = data.train, data.validation, data.classes
    possible = [k for k in config.k if k <= len(train)]
    if not possible:
        raise UserError(f"k={config.k} are all more than the {len(train)} training examples; lower one of them")

    # Validation: hits of every pair, each from the first k of the same neighbors.
    index, largest = KnnIndex.build(train.features.last, train.labels), max(possible)
    pairs = list(itertools.product(possible, config.temperatures))
    correct = np.zeros(len(pairs))
    with data.progress.bar("kNN", len(validation)) as update:
        for rows, nearest in search(index, validation.features.last, largest, config.query_chunk):
            truth = validation.labels[rows]
            correct += [np.sum(count_votes(nearest, classes, *pair).argmax(axis=1) == truth) for pair in pairs]
            update(rows.stop)

    # The best pair classifies every other split.
    scores = (100 * correct / len(validation)).tolist()
    tried = [{"k": k, "temperature": t, "validation_top1": x} for (k, t), x in zip(pairs, scores, strict=True)]
    best = best_trial(tried)
    k, temperature = best["k"], best["temperature"]

    def predict(dataset: EvalDataset) -> TopKPredictions:
        parts = search(index, dataset.features.last, largest, config.query_chunk)
        return np.concatenate([topk(count_votes(nearest, classes, k, temperature)) for _, nearest in parts])

    return [FittedProbe("kNN", predict, best, f"k {k}, temperature {temperature:g}", tried)]


def count_votes(nearest: Neighbors, classes: int, k: int, temperature: float) -> Float[np.ndarray, "queries classes"]:
    """Sums the votes exp(s / T) of the k nearest by class; -inf for a class without a vote, which is not predicted.

    The largest similarity of a query is subtracted from all of them: ratios do not change, and exp cannot overflow.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.
    """
    # Similarities are sorted, so the first one is the query's largest.
    near = nearest.similarity[:, :k].astype(np.float64)
    weights = np.exp((near - near[:, :1]) / temperature)

    # One sum for all queries: cell q * classes + c collects the votes of query q for class c.
    cell = nearest.labels[:, :k] + classes * np.arange(len(near))[:, None]
    sums = np.bincount(cell.ravel(), weights.ravel(), len(near) * classes).reshape(-1, classes)
    return np.where(sums > 0, sums, -np.inf).astype(np.float32)


def search(
    index: KnnIndex, queries: Float[np.ndarray, "queries dim"], k: int, chunk: int
) -> Iterator[tuple[slice, Neighbors]]:
    """Yields the rows of each chunk of queries with their neighbors: at most chunk x keys similarities at a time.

    The last chunk is padded, so that one program serves any number of queries.
    """
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))

        # Rows of padding are searched too, then dropped.
        nearest = jax.device_get(_nearest_neighbors(index.features, index.norms, padded, _norms(padded), k))
        similarity, rows = (array[: len(part)] for array in nearest)
        yield slice(start, start + len(part)), Neighbors(similarity, index.labels[rows])


@partial(eval_jit, static_argnames="k")
def _nearest_neighbors(
    features: Float[AnyArray, "keys dim"],
    norms: Float[AnyArray, "keys"],
    queries: Float[AnyArray, "queries dim"],
    query_norms: Float[AnyArray, "queries"],
    k: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Cosine similarities of the nearest keys, in float32 at full precision on every device, and their row numbers.

    Ties are ordered by row number.
    """
    # HIGHEST: an accelerator's default rounds the factors, which could swap neighbors that are nearly as close.
    product = jnp.einsum("qd,kd->qk", queries, features, precision=lax.Precision.HIGHEST)
    values, rows = lax.top_k(product / query_norms[:, None] / norms, k)
    return values, rows


def _norms(rows: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n"]:
    """Euclidean norms, with 1 for rows of zeros."""
    norms = np.linalg.norm(rows, axis=1)
    return np.where(norms > 0, norms, np.float32(1))
