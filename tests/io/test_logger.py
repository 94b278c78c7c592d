"""The log file: appended to, mended, and strict JSON."""

import json

from jepax.io import logger


def values(loss):
    return {"train/loss": loss, "perf/images_per_sec": 10.0, "perf/step_time": 0.1, "by_layer": [1.0, float("nan")]}


def test_a_resumed_run_takes_its_steps_again_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start in (0, 2):
        with logger.Log(path, steps=4, start=start) as log:
            for step in range(start, 4):
                log.write(step, values(float(start + step)))
    lines = logger.read_metrics(path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["train/loss"] for line in lines] == [0.0, 1.0, 4.0, 5.0]


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with logger.Log(path, steps=1, start=0) as log:
        log.write(0, values(float("inf")) | {"train/loss": float("inf")})
    line = json.loads(path.read_text(), parse_constant=lambda name: 1 / 0)
    assert line["train/loss"] is None and line["by_layer"] == [1.0, None]


def test_a_torn_last_line_is_dropped_and_mended(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "train/loss": 1.0}\n{"step": 1, "lo')
    with logger.Log(path, steps=3, start=1):
        pass
    assert path.read_text() == '{"step": 0, "train/loss": 1.0}\n'


def test_clock():
    assert (
        logger.format_duration(5) == "0:05"
        and logger.format_duration(125.4) == "2:05"
        and logger.format_duration(3725) == "1:02:05"
    )


def test_the_first_step_predicts_no_time_left(tmp_path, capsys, monkeypatch):
    """Its time is that of compilation."""
    monkeypatch.setattr(logger, "PRINT_EVERY_S", -1.0)
    with logger.Log(tmp_path / "metrics.jsonl", steps=30, start=0) as log:
        log.write(0, values(1.0) | {"perf/step_time": 3600.0})
        log.write(9, values(1.0))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/30") and "left" not in first
    assert second.startswith("step 10/30") and second.endswith("0:02 left")
