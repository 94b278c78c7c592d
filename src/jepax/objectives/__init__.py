"""The equations: array functions on the global batch."""

from jepax.objectives.prediction import masked_mean, share_explained, smooth_l1, squared_error
from jepax.objectives.vicreg import covariance, variance

__all__ = ["covariance", "masked_mean", "share_explained", "smooth_l1", "squared_error", "variance"]
