"""Sweeps: sets of runs that are compared, row by row, in one table and one figure."""

from jepax.sweeps.base import SWEEPS, Sweep, Variant, sweep
from jepax.sweeps.builtin import ablations_fashion_mnist, family_fashion_mnist

__all__ = ["SWEEPS", "Sweep", "Variant", "ablations_fashion_mnist", "family_fashion_mnist", "sweep"]
