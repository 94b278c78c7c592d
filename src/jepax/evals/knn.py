"""Weighted k-nearest-neighbour classification of frozen features: exact, and nothing is trained."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jepax.evals.features import MISS, Features, Scores, check_labels, rank_of_label, scores
from jepax.types import AnyArray, Array, Float, Int, UserError


@dataclass(frozen=True)
class KnnConfig:
    """How the neighbours vote; the defaults are Wu et al.'s temperature and the usual k of 20."""

    neighbours: int = 20
    """Voters per query, at most the number of training examples."""
    temperature: float = 0.07
    """T of the vote exp(similarity / T)."""
    chunk: int = 256
    """Queries compared with all keys at once; memory is chunk x keys x 4 bytes."""

    def __post_init__(self):
        if self.neighbours < 1 or self.chunk < 1 or self.temperature <= 0:
            raise UserError(f"neighbours, chunk and temperature must be positive, and are not in {self}")


@partial(jax.jit, static_argnames=("classes", "config"))
def knn_votes(
    keys: Float[AnyArray, "keys dim"],
    labels: Int[AnyArray, "keys"],
    queries: Float[AnyArray, "queries dim"],
    *,
    classes: int,
    config: KnnConfig,
) -> Float[Array, "queries classes"]:
    """By class, the sum of the votes exp(s / T) of the k keys of largest cosine similarity s.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.

    The similarities are float32 products at full precision on every device.
    """
    unit_keys = _unit(keys).T

    def chunk_votes(chunk):
        similarity = jnp.dot(_unit(chunk), unit_keys, precision=lax.Precision.HIGHEST)
        values, index = lax.top_k(similarity, config.neighbours)  # exact; equals go to the lower index
        voters = jax.nn.one_hot(labels[index], classes)
        return jnp.einsum("qk,qkc->qc", jnp.exp(values / config.temperature), voters, precision=lax.Precision.HIGHEST)

    size = min(config.chunk, len(queries))
    chunks = -(-len(queries) // size)
    padded = jnp.pad(queries, ((0, chunks * size - len(queries)), (0, 0)))
    votes = lax.map(chunk_votes, padded.reshape(chunks, size, -1))
    return votes.reshape(chunks * size, classes)[: len(queries)]


def _unit(rows: Float[AnyArray, "n dim"]) -> Float[Array, "n dim"]:
    """Rows of length 1; a row of zeros stays zero and is equally far from everything."""
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(length > 0, length, 1)


def knn(train: Features, test: Features, classes: int, config: KnnConfig | None = None) -> Scores:
    """Top-1 and top-5 of the last layer's features, in percent; the training split's examples vote.

    A class without a vote is never a hit, even where fewer than five classes have one.

    **Raises** `UserError` if there are fewer training examples than `neighbours`, or a label is out of range.
    """
    config = KnnConfig() if config is None else config
    check_labels(train.labels, classes, "train")
    check_labels(test.labels, classes, "test")
    if config.neighbours > len(train.labels):
        raise UserError(
            f"neighbours={config.neighbours} is more than the {len(train.labels)} training examples; lower it"
        )
    votes = knn_votes(train.last, train.labels, test.last, classes=classes, config=config)
    named = jnp.take_along_axis(votes, test.labels[:, None], axis=1)[:, 0] > 0
    return scores(jnp.where(named, rank_of_label(votes, test.labels), MISS))
