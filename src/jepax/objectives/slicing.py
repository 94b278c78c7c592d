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
    # Chunks of equal size, so that the padding is small. (chunks, dim, chunk) and (chunks, chunk)
    dim, count = directions.shape
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    padded = jnp.pad(directions, ((0, 0), (0, chunks * chunk - count))).reshape(dim, chunks, chunk)
    valid = (jnp.arange(chunks * chunk) < count).reshape(chunks, chunk)

    @jax.checkpoint
    def add(total: Float[Array, ""], part: tuple[Array, Array]) -> tuple[Float[Array, ""], None]:
        directions, valid = part
        return total + jnp.sum(jnp.where(valid, statistic(directions), 0.0)), None

    return jax.lax.scan(add, jnp.zeros((), directions.dtype), (padded.transpose(1, 0, 2), valid))[0] / count
