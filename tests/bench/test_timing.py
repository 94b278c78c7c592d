"""Calls in turn."""

import numpy as np

from jepax.bench import timing


def test_calls_take_turns_and_warm_ones_do_not_count():
    order = []
    times = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == list("abbaabbaab") and {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_percentiles():
    times = list(np.arange(101.0))
    assert timing.percentiles(times) == {"p10": 10.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
