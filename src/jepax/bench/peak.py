"""Measures the peak for utilization: the machine's fastest matrix product.

The matrices are random: with constant ones a GPU draws less power and exceeds the speed of any training.
"""

import jax
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike

from jepax.bench.timing import WARMUP_CALLS, time_call

MATRIX_SIZES = {"cpu": (768, 1536, 3072)}
DEFAULT_MATRIX_SIZES = (4096, 8192, 16384)
"""Sides of the square matrices on platforms that `MATRIX_SIZES` does not list."""
CHAIN_LENGTH = 8
"""Chained products in one program, so that the launch time is negligible."""


def measure_peak_flops(compute: DTypeLike, rounds: int = 5) -> float:
    """FLOP/s of one device, the best of a few sizes; products in the compute dtype, sums in float32."""
    best = 0.0
    for side in MATRIX_SIZES.get(jax.default_backend(), DEFAULT_MATRIX_SIZES):
        a = (jr.normal(jr.key(0), (side, side)) / side**0.5).astype(compute)
        chain = jax.jit(lambda a: lax.fori_loop(0, CHAIN_LENGTH, lambda _, x: x @ a, a))
        times = [time_call(lambda chain=chain, a=a: chain(a)) for _ in range(WARMUP_CALLS + rounds)]
        best = max(best, 2 * side**3 * CHAIN_LENGTH / min(times[WARMUP_CALLS:]))
    return best
