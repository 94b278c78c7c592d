"""`jepax bench` on a tiny recipe: its numbers are consistent, and its table has them."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from jepax.bench import machine, run
from jepax.bench.step_bench import StepBenchmark
from jepax.commands.bench import Bench
from jepax.types import UserError

TINY = """
    --data.dataset synthetic --data.canvas-size 28 --data.channels 1 --data.synthetic-size 80
    --method.encoder.width 24 --method.encoder.depth 1 --method.predictor.width 12 --method.predictor.depth 1
    --train.batch-size 16 --train.steps 30 --optim.warmup-epochs 0.2
""".split()


def config(*words):
    """The demo's config with these overrides."""
    return Bench.read("bench", ["ijepa_fashion_mnist", *words]).config()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Numbers of the demo's method, tiny, as they are written; and the table."""
    path = tmp_path_factory.mktemp("bench") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "MATRIX_SIZES", {"cpu": (64,)})
        measured = run.measure_step(config(*TINY), 3, print=lambda line: None)
    run.publish(measured, run.step_rows(measured), path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(measured))
    return measured


@pytest.mark.long
def test_the_parts_add_up_and_are_named(found):
    parts = ["draw", "forward", "objective", "backward", "optimizer and teacher"]
    assert list(found["parts"]) == parts
    step = sum(found["parts"].values())
    assert 0.2 * found["steps"]["step_s"]["p50"] < step < 5 * found["steps"]["step_s"]["p50"]


@pytest.mark.long
def test_speed_and_utilisation_follow_from_time_and_arithmetic(found):
    steps, use = found["steps"], found["utilization"]
    assert steps["images_per_s"] == pytest.approx(16 / steps["step_s_pipelined"])
    assert use["tflop_per_s"] == pytest.approx(use["gflop_per_image"] * steps["images_per_s"] / 1000 / 8)  # devices
    assert use["utilization"] == pytest.approx(use["tflop_per_s"] / use["peak_tflop_per_s"])
    assert 0 <= found["input"]["input_wait_fraction"] <= 1


@pytest.mark.long
def test_one_program_is_compiled_and_is_found_again(found):
    compiled = found["compile"]
    assert found["steps"]["programs"] == 1
    assert compiled["compile_warm_s"] < compiled["compile_cold_s"]
    assert compiled["program_bytes"] > 0


@pytest.mark.long
def test_the_machine_and_the_config_are_told(found):
    assert found["machine"]["versions"]["jax"] and found["machine"]["cores"] >= 1
    assert found["config"]["method"]["encoder"]["width"] == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "jepax bench takes RECIPE"),
        (["ijepa_fashion_mnist", "--repeats"], "a value is missing"),
        (["ijepa_fashion_mnist", "--repeats", "few"], "few"),
        (["ijepa_fashion_mnist", "--repeats", "0"], "--repeats 0"),
    ],
)
def test_what_is_not_understood_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        Bench.read("bench", words)


def test_no_step_is_counted_that_was_done_before_the_clock_started():
    """As on a CPU, where a step that is sent off is done."""

    class Slow(StepBenchmark):
        def __init__(self):
            self.config = config()

        def step(self, batch=None):
            time.sleep(0.02)
            return {"train/loss": jax.block_until_ready(jnp.zeros(()))}

    assert Slow().steps(3)["step_s_pipelined"] >= 0.02


SOUND = {
    "machine": {"load_average": (0.4, 2.0, 2.0), "cores": 2},
    "utilization": {"utilization": 0.5},
    "parts": {"teacher": 0.4, "objective": -0.01, "backward": 0.6},
}


def test_an_idle_machine_is_not_doubted():
    assert run.sanity_warnings(SOUND) == []
    assert run.sanity_warnings({"machine": SOUND["machine"]}) == []  # of reading, which has no more


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"machine": {"load_average": (1.9, 0.0, 0.0), "cores": 2}}, "load average was 1.9 on 2 cores"),
        ({"utilization": {"utilization": 1.29}}, "utilization above 100%"),
        ({"parts": SOUND["parts"] | {"objective": -0.06}}, "objective below zero"),
    ],
)
def test_what_cannot_be_is_doubted(changed, said):
    (doubt,) = run.sanity_warnings(SOUND | changed)
    assert said in doubt
