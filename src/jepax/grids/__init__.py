"""Grids: lists of runs that are compared, row by row, in one table and one figure."""

from jepax.grids.base import GRIDS, Grid, Row, grid
from jepax.grids.shipped import ablations_fashion_mnist, family_fashion_mnist

__all__ = ["GRIDS", "Grid", "Row", "ablations_fashion_mnist", "family_fashion_mnist", "grid"]
