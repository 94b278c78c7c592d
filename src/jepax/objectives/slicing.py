"""Random projection directions, and means over them in chunks of bounded memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

DIRECTIONS_PER_CHUNK = 128
"""Directions projected together, in one chunk."""


def random_unit_directions(key: PRNGKeyArray, dim: int, count: int) -> Float[Array, "dim directions"]:
    """`count` directions, uniform on the unit sphere. One key gives the same directions on every device."""
    drawn = jr.normal(key, (dim, count))
    return drawn / jnp.linalg.norm(drawn, axis=0)


def project_onto_directions(
    embeddings: Float[Array, "batch dim"], directions: Float[Array, "dim chunk"]
) -> Float[Array, "batch chunk"]:
    """Projections in float32 on every device: the default precision of accelerators has ten bits of mantissa."""
    return jnp.matmul(embeddings, directions, precision=jax.lax.Precision.HIGHEST)


def sliced_mean(
    statistic: Callable[[Float[Array, "dim chunk"]], Float[Array, "chunk"]],
    directions: Float[Array, "dim directions"],
    chunk: int | None = DIRECTIONS_PER_CHUNK,
) -> Float[Array, ""]:
    """Mean of a statistic over the directions, `chunk` at a time, in the forward and the backward pass.

    Memory is that of one chunk: the backward pass recomputes each chunk. None uses one chunk for all directions.
    """
    if chunk is None:
        return jnp.mean(statistic(directions))
    dim, count = directions.shape
    pieces = -(-count // chunk)
    chunk = -(-count // pieces)  # chunks of equal size, so the padding is small
    padded = jnp.pad(directions, ((0, 0), (0, pieces * chunk - count))).reshape(dim, pieces, chunk)
    real = (jnp.arange(pieces * chunk) < count).reshape(pieces, chunk)

    @jax.checkpoint
    def one(total: Float[Array, ""], piece: tuple[Array, Array]) -> tuple[Float[Array, ""], None]:
        some, kept = piece
        return total + jnp.sum(jnp.where(kept, statistic(some), 0.0)), None

    total, _ = jax.lax.scan(one, jnp.float32(0), (padded.transpose(1, 0, 2), real))
    return total / count
