"""The equations: array functions on the global batch."""

from jepax.objectives.prediction import masked_mean, smooth_l1, squared_error

__all__ = ["masked_mean", "smooth_l1", "squared_error"]
