"""The figure of a sweep shows each score where it belongs."""

import dataclasses

import numpy as np

from jepax.sweeps.figure import plot_sweep
from jepax.sweeps.table import Result

FIRST = Result(
    row="a", seed=0, validation=90.0, linear=80.0, knn=70.0, untrained_linear=60.0, untrained_knn=50.0,
    pixels_linear=40.0, pixels_knn=30.0, majority=10.0, minutes=5.0, effective_rank=20.0, untrained_rank=9.0,
    steps=3, batch_size=16, device="cpu",
)  # fmt: skip


def test_every_run_is_a_dot_and_every_mean_and_baseline_a_mark():
    runs = [FIRST, dataclasses.replace(FIRST, seed=1, linear=82.0, minutes=7.0), dataclasses.replace(FIRST, row="b")]
    scores, rank, minutes = plot_sweep("title", runs).axes
    lines = {line.get_label(): list(line.get_xdata()) for line in scores.lines if line.get_label()[0] != "_"}
    assert lines == {
        "linear": [80.0, 82.0],
        "kNN": [70.0, 70.0],
        "untrained, linear": [60.0, 60.0],
        "raw pixels, linear": [40.0, 40.0],
        "untrained, kNN": [50.0, 50.0],
        "raw pixels, kNN": [30.0, 30.0],
    }
    bars = [collection.get_segments()[0][0][0] for collection in scores.collections]
    np.testing.assert_allclose(bars, [81.0, 80.0, 70.0, 70.0])
    assert [bar.get_width() for bar in minutes.patches] == [6.0, 5.0]
    assert [bar.get_width() for bar in rank.patches] == [20.0, 20.0]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["a", "b"]
