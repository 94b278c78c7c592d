"""Fixed two-dimensional sine-cosine positions for a grid of patches of any height and width."""

import numpy as np
from jaxtyping import Float

from jepax.types import UserError


def sincos_2d(grid: tuple[int, int], dim: int) -> Float[np.ndarray, "patches dim"]:
    """Positions of a row-major grid (height, width): the first half of `dim` encodes the column, the second the row.

    Each half is sin(x w_i), then cos(x w_i), with w_i = 10000^(-i / (dim/4)). Source: the fixed table of MAE (He et al.
    2022, appendix A), which I-JEPA uses; computed in float64 and rounded once.

    Raises `UserError` if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"width={dim} is not a multiple of 4, which two-dimensional sine-cosine positions need;"
            f" try {dim + 4 - dim % 4}"
        )

    # The row and the column of each patch: (patches,)
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")

    # (patches, dim / 2) for each of the two, side by side
    halves = [_sincos_1d(axis.reshape(-1).astype(np.float64), dim // 2) for axis in (columns, rows)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def _sincos_1d(coordinate: Float[np.ndarray, "patches"], dim: int) -> Float[np.ndarray, "patches dim"]:
    frequency = 10000.0 ** -(np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = coordinate[:, None] * frequency[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
