"""The peak that utilisation is held against: the fastest matrix product that this machine was seen to do.

Of random numbers: a GPU that is given equal ones draws less power, and so reads higher than any training could.
"""

import jax
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike

from jepax.bench.clock import WARM, seconds

SIZES = {"cpu": (768, 1536, 3072)}
LARGE = (4096, 8192, 16384)
"""Sides of the square matrices, by platform; `LARGE` where there is no entry."""
CHAIN = 8
"""Products in one program, each of the last one's result, so that no launch is counted."""


def matrix_peak(compute: DTypeLike, rounds: int = 5) -> float:
    """FLOP/s of one device: the best of a few sizes, products of the compute type with sums in float32."""
    best = 0.0
    for side in SIZES.get(jax.default_backend(), LARGE):
        a = (jr.normal(jr.key(0), (side, side)) / side**0.5).astype(compute)
        chain = jax.jit(lambda a: lax.fori_loop(0, CHAIN, lambda _, x: x @ a, a))
        times = [seconds(lambda chain=chain, a=a: chain(a)) for _ in range(WARM + rounds)]
        best = max(best, 2 * side**3 * CHAIN / min(times[WARM:]))
    return best
