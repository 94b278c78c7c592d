"""What keeps a method's embeddings apart: one of four regularisers by name, for methods that take any of them."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.objectives import covariance, rdmreg, sigreg, variance, visreg
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics, UserError

FIELDS_BY_NAME = {
    "none": {"kind", "weight"},
    "sigreg": {"kind", "weight", "directions"},
    "rdmreg": {"kind", "weight", "directions", "p", "mu"},
    "vicreg": {"kind", "weight", "variance", "covariance"},
    "visreg": {"kind", "weight", "directions", "scale", "centre", "shape"},
}
"""The fields that each kind reads."""


@dataclass(frozen=True)
class RegularizerConfig:
    """One regulariser and its weights; a field that names another kind is not read, and says so where it was set.

    Only the weight may stay where kind is none, so that a recipe's regulariser is switched off by its kind alone.
    """

    kind: Literal["none", "sigreg", "rdmreg", "vicreg", "visreg"] = "none"
    """None, or the regulariser's name."""
    weight: float = 1.0
    """Its weight in the loss. That of sigreg, which grows with the global batch, belongs to a batch size."""
    directions: int = 256
    """sigreg, rdmreg, visreg: directions of projection, drawn anew at each step."""
    variance: float = 25.0
    """vicreg: weight of the variance term within the regulariser, as in the paper's equation."""
    covariance: float = 1.0
    """vicreg: weight of the covariance term within the regulariser, as in the paper's equation."""
    scale: float = 1.0
    """visreg: weight of the scale term within the regulariser."""
    centre: float = 1.0
    """visreg: weight of the centre term within the regulariser."""
    shape: float = 1.0
    """visreg: weight of the shape term within the regulariser."""
    p: float = 1.0
    """rdmreg: exponent of the generalised Gaussian: 1 is Laplace's distribution, 2 the normal."""
    mu: float = 0.0
    """rdmreg: mean of the generalised Gaussian before its rectification; lower is sparser."""

    def __post_init__(self) -> None:
        for name in ("weight", "variance", "covariance", "scale", "centre", "shape"):
            if getattr(self, name) < 0:
                raise UserError(f"regulariser.{name}={getattr(self, name)} must not be negative")
        for name in ("directions", "p"):
            if getattr(self, name) <= 0:
                raise UserError(f"regulariser.{name}={getattr(self, name)} must be above 0")
        for field in fields(self):
            if field.name not in FIELDS_BY_NAME[self.kind] and getattr(self, field.name) != field.default:
                warnings.warn(
                    f"regulariser.{field.name}={getattr(self, field.name)} is not read by regulariser.kind={self.kind}",
                    stacklevel=2,
                )

    def tiny(self) -> "RegularizerConfig":
        """The same regularizer along few directions, as tests run it."""
        return replace(self, directions=16) if "directions" in FIELDS_BY_NAME[self.kind] else self


def regularize(
    config: RegularizerConfig, embeddings: Float[Array, "batch dim"], *, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted regulariser of the global batch, and its unweighted terms. Scale: as each objective says.

    RDMReg asks for features that are not negative, so it reads max(0, embeddings). Where a dimension is below 0 on the
    whole batch its gradient is zero: RDMReg charges for such a dimension, but does not bring it back.
    """
    match config.kind:
        case "none":
            return jnp.float32(0), {}
        case "vicreg":
            weights = {"variance": config.variance, "covariance": config.covariance}
            terms = {"variance": variance(embeddings), "covariance": covariance(embeddings)}
        case "visreg":
            directions = random_unit_directions(key, embeddings.shape[1], config.directions)
            weights = {"scale": config.scale, "centre": config.centre, "shape": config.shape}
            terms = {
                "scale": visreg.scale_term(embeddings),
                "centre": visreg.center_term(embeddings),
                "shape": visreg.shape_term(embeddings, directions),
            }
        case "sigreg":
            directions = random_unit_directions(key, embeddings.shape[1], config.directions)
            weights, terms = {"sigreg": 1.0}, {"sigreg": sigreg.sigreg(embeddings, directions)}
        case "rdmreg":
            key_directions, key_target = jr.split(key)
            directions = random_unit_directions(key_directions, embeddings.shape[1], config.directions)
            target = rdmreg.sample_target(key_target, embeddings.shape, p=config.p, mu=config.mu)
            weights = {"rdmreg": 1.0}
            terms = {"rdmreg": rdmreg.rdmreg(jnp.maximum(embeddings, 0), target, directions)}
    value = sum(weights[name] * term for name, term in terms.items())
    return config.weight * value, {f"{name}_loss": term for name, term in terms.items()}
