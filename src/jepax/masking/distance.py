"""Distances between masks on the grid of patches."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jepax.types import Masks


def distance_to_nearest(masks: Masks, grid: tuple[int, int]) -> Float[Array, "batch blocks context"]:
    """From each context patch to the nearest patch of each target block, center to center, in patches (>= 1)."""
    columns = grid[1]

    def places(indices: Array) -> Float[Array, "*shape 2"]:
        return jnp.stack([indices // columns, indices % columns], axis=-1).astype(jnp.float32)

    apart = places(masks.context)[:, None, :, None] - places(masks.targets)[:, :, None]
    distances = jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1))
    return jnp.min(jnp.where(masks.target_valid[:, :, None], distances, jnp.inf), axis=-1)
