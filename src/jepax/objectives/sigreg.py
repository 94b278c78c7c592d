"""SIGReg: match the embeddings along any direction to a standard normal (Balestriero & LeCun 2025)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jepax.objectives.slicing import DIRECTIONS_PER_CHUNK, project_onto_directions, sliced_mean

NUM_KNOTS = 17
INTEGRATION_LIMIT = 3.0


def epps_pulley(
    projections: Float[Array, "batch directions"], knots: int = NUM_KNOTS, limit: float = INTEGRATION_LIMIT
) -> Float[Array, "directions"]:
    """N * integral from -limit to limit of |phi_N(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, per column.

    phi_N(t) = mean over examples of exp(i t x) is the empirical characteristic function of the N examples of the global
    batch. The integrand is even: the trapezoid rule uses `knots` points on [0, limit], each inner weight doubled.

    Scale: N times a mean, so a normal sample scores about the same at any N, and a sample far from normal scores in
    proportion to N: tune the loss weight per batch size. The input is not standardized.
    Source: Epps & Pulley 1983; Balestriero & LeCun 2025 (arXiv:2511.08544), section 4.
    """
    points = jnp.linspace(0.0, limit, knots)
    normal = jnp.exp(-jnp.square(points) / 2)  # both the normal's characteristic function and the window
    step = limit / (knots - 1)
    weights = jnp.full(knots, 2 * step).at[jnp.array([0, -1])].set(step) * normal
    angles = projections[..., None] * points
    real, imaginary = jnp.mean(jnp.cos(angles), axis=0), jnp.mean(jnp.sin(angles), axis=0)
    return projections.shape[0] * jnp.sum((jnp.square(real - normal) + jnp.square(imaginary)) * weights, axis=-1)


def sigreg(
    embeddings: Float[Array, "batch dim"],
    directions: Float[Array, "dim directions"],
    chunk: int | None = DIRECTIONS_PER_CHUNK,
    *,
    knots: int = NUM_KNOTS,
) -> Float[Array, ""]:
    """Mean over unit `directions` of the Epps-Pulley statistic of the projected embeddings, `chunk` at a time.

    Scale: proportional to the global batch N away from the optimum. Source: Balestriero & LeCun 2025, SIGReg.
    """
    return sliced_mean(lambda part: epps_pulley(project_onto_directions(embeddings, part), knots), directions, chunk)


def sigreg_by_group(
    groups: Float[Array, "groups batch dim"], directions: Float[Array, "dim directions"], knots: int = NUM_KNOTS
) -> Float[Array, ""]:
    """Mean of `sigreg` over groups, such as views or the frames of a clip; each is normal by itself.

    The groups share the directions. Source: Balestriero & LeCun 2025, LeJEPA; Maes et al. 2026, LeWorldModel.
    """
    return jnp.mean(jax.vmap(lambda group: sigreg(group, directions, knots=knots))(groups))
