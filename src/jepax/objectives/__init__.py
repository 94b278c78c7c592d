"""The equations: array functions on the global batch."""

from jepax.objectives.regression import explained_fraction, masked_mean, smooth_l1
from jepax.objectives.vicreg import covariance, variance

__all__ = ["covariance", "explained_fraction", "masked_mean", "smooth_l1", "variance"]
