"""Times interleaved calls, so that a disturbance of the machine affects all of them."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

WARMUP_CALLS = 2
"""Number of first calls that are not counted."""


def time_call(call: Callable[[], object]) -> float:
    """Seconds until the call's result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; every other round calls them in the reverse order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP_CALLS + rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            taken = time_call(calls[name])
            if turn >= WARMUP_CALLS:
                times[name].append(taken)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The 10th, 50th, 90th and 99th percentile, in seconds."""
    return {f"p{at}": float(np.percentile(times, at)) for at in (10, 50, 90, 99)}
