"""Seconds of calls, taken in turn, so that a disturbance of the machine meets all of them."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

WARMUP_CALLS = 2
"""Calls of each that are not counted."""


def time_call(call: Callable[[], object]) -> float:
    """Until the call's result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; every other round goes through them backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP_CALLS + rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            taken = time_call(calls[name])
            if turn >= WARMUP_CALLS:
                times[name].append(taken)
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """The median and what lies about it, in seconds."""
    return {f"p{at}": float(np.percentile(times, at)) for at in (10, 50, 90, 99)}


def median_ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Quotient of the medians, and the quartiles of the quotients of neighbouring calls."""
    pairs = np.array(ours) / np.array(theirs)
    low, high = np.percentile(pairs, (25, 75))
    return {"ratio": float(np.median(ours) / np.median(theirs)), "low": float(low), "high": float(high)}
