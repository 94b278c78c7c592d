"""Messages of an evaluation's progress."""

from jepax.evals import progress


def test_the_time_left_counts_from_the_first_call(monkeypatch):
    """A program is compiled before it: 100 seconds here, then 2 for each item."""
    printed, now = [], [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(printed.append).bar("probe", 40) as update:
        for count, seconds in ((1, 102.0), (2, 104.0), (11, 122.0), (40, 180.0)):
            now[0] = seconds
            update(count)
    assert printed == ["probe: 2/40, 1:16 left", "probe: 11/40, 0:58 left"]
