"""Lines of what happened to a run."""

from jepax.io import events
from jepax.io.events import Events


def test_lines_come_back_and_torn_ones_do_not(tmp_path):
    happened = Events(tmp_path)
    happened.add("started", 0, devices=1)
    happened.add("skipped", 3, step_bound=True)
    with happened.path.open("a") as file:
        file.write('{"event": "skip')
    lines = events.read_jsonl(happened.path)
    assert [(line["event"], line["step"]) for line in lines] == [("started", 0), ("skipped", 3)]
    assert lines[0]["devices"] == 1


def test_steps_that_are_taken_again_leave_one_line(tmp_path):
    """Only their own events are dropped; and a line after a torn one is whole."""
    happened = Events(tmp_path)
    for event, step, retaken in (
        ("started", 0, False),
        ("skipped", 3, True),
        ("skipped", 5, True),
        ("saved", 6, False),
    ):
        happened.add(event, step, step_bound=retaken)
    with happened.path.open("a") as file:
        file.write('{"torn')
    happened.truncate_from(4)
    happened.add("skipped", 5, step_bound=True)
    lines = [(line["event"], line["step"]) for line in events.read_jsonl(happened.path)]
    assert lines == [("started", 0), ("skipped", 3), ("saved", 6), ("skipped", 5)]


def test_the_newest_value_is_found(tmp_path):
    happened = Events(tmp_path)
    assert happened.last("compute_dtype", "float32") == "float32"
    for event, details in (("started", {"compute_dtype": "bfloat16"}), ("skipped", {})):
        happened.add(event, 0, **details)
    assert happened.last("compute_dtype", "float32") == "bfloat16"


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(events.multihost, "is_main_process", lambda: False)
    Events(tmp_path).add("started", 0)
    assert list(tmp_path.iterdir()) == []
