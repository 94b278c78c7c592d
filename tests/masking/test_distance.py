"""Distances between masks on the grid."""

import jax.numpy as jnp
import numpy as np

from jepax.masking import distance_to_nearest
from jepax.types import Masks


def test_distances_are_euclidean_to_the_nearest_real_patch_of_each_block():
    # A grid of 3 rows and 5 columns: patch 7 lies at (1, 2), 0 at (0, 0), 14 at (2, 4).
    masks = Masks(
        context=jnp.array([[7, 0]]),
        targets=jnp.array([[[14, 8], [5, 7]]]),
        target_valid=jnp.array([[[True, True], [True, False]]]),
    )
    expected = [[[1.0, np.hypot(1, 3)], [2.0, 1.0]]]
    np.testing.assert_allclose(distance_to_nearest(masks, (3, 5)), expected, rtol=1e-6)
