"""Regularizers against collapse, chosen by name, for methods that support any of them."""

import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.objectives import covariance, rdmreg, sigreg, variance, visreg
from jepax.objectives.slicing import random_unit_directions
from jepax.types import Metrics

FIELDS_BY_NAME = {
    "none": {"name", "weight"},  # its weight has no effect, so that the name alone switches off a recipe's regularizer
    "sigreg": {"name", "weight", "num_slices"},
    "rdmreg": {"name", "weight", "num_slices", "p", "mu"},
    "vicreg": {"name", "weight", "variance_weight", "covariance_weight"},
    "visreg": {"name", "weight", "num_slices", "scale_weight", "center_weight", "shape_weight"},
}
"""Fields that each regularizer reads."""


@dataclass(frozen=True)
class RegularizerConfig:
    """One regularizer and its weights. A field of another regularizer is not read; setting one raises a warning."""

    name: Literal["none", "sigreg", "rdmreg", "vicreg", "visreg"] = "none"
    """Regularizer, or none."""
    weight: float = 1.0
    """Weight in the loss. sigreg grows with the global batch, so its weight depends on the batch size."""
    num_slices: int = 256
    """sigreg, rdmreg, visreg: projection directions, redrawn at each step."""
    variance_weight: float = 25.0
    """vicreg: weight of the variance term within the regularizer, as in the paper's equation."""
    covariance_weight: float = 1.0
    """vicreg: weight of the covariance term within the regularizer, as in the paper's equation."""
    scale_weight: float = 1.0
    """visreg: weight of the scale term within the regularizer."""
    center_weight: float = 1.0
    """visreg: weight of the center term within the regularizer."""
    shape_weight: float = 1.0
    """visreg: weight of the shape term within the regularizer."""
    p: float = 1.0
    """rdmreg: exponent of the generalized Gaussian: 1 is Laplace's distribution, 2 the normal."""
    mu: float = 0.0
    """rdmreg: mean of the generalized Gaussian before its rectification; lower is sparser."""

    def __post_init__(self) -> None:
        weights = [field.name for field in fields(self) if field.name.endswith("weight")]
        check_fields("regularizer", self, "at least 0", *weights)
        check_fields("regularizer", self, "above 0", "num_slices", "p")
        # A setting without effect is a silent error.
        for field in fields(self):
            if field.name not in FIELDS_BY_NAME[self.name] and getattr(self, field.name) != field.default:
                given = f"regularizer.{field.name}={getattr(self, field.name)}"
                warnings.warn(f"{given} is not read by regularizer.name={self.name}", stacklevel=2)

    def tiny(self) -> "RegularizerConfig":
        """The same regularizer with few directions, for tests."""
        return replace(self, num_slices=16) if "num_slices" in FIELDS_BY_NAME[self.name] else self


def regularize(
    config: RegularizerConfig, embeddings: Float[Array, "batch dim"], *, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted regularizer of the global batch, and its unweighted terms. Scale: see each objective."""
    match config.name:
        case "none":
            return jnp.float32(0), {}
        case "vicreg":
            weights = {"variance": config.variance_weight, "covariance": config.covariance_weight}
            terms = {"variance": variance(embeddings), "covariance": covariance(embeddings)}
        case "visreg":
            directions = random_unit_directions(key, embeddings.shape[1], config.num_slices)
            weights = {"scale": config.scale_weight, "center": config.center_weight, "shape": config.shape_weight}
            terms = {
                "scale": visreg.scale_term(embeddings),
                "center": visreg.center_term(embeddings),
                "shape": visreg.shape_term(embeddings, directions),
            }
        case "sigreg":
            directions = random_unit_directions(key, embeddings.shape[1], config.num_slices)
            weights, terms = {"sigreg": 1.0}, {"sigreg": sigreg.sigreg(embeddings, directions)}
        case "rdmreg":
            key_directions, key_target = jr.split(key)
            directions = random_unit_directions(key_directions, embeddings.shape[1], config.num_slices)
            target = rdmreg.sample_target(key_target, embeddings.shape, p=config.p, mu=config.mu)
            # The target has no negative numbers. A dimension below 0 on the entire batch has no gradient: RDMReg
            # penalizes it but cannot revive it.
            weights, terms = {"rdmreg": 1.0}, {"rdmreg": rdmreg.rdmreg(jnp.maximum(embeddings, 0), target, directions)}
    # One weight for all terms, and one for each.
    value = sum(weights[name] * term for name, term in terms.items())
    return config.weight * value, {f"train/{name}_loss": term for name, term in terms.items()}
