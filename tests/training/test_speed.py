"""Speed metrics: what a step computes is counted once, and compared with the device's peak."""

from dataclasses import replace

import jax
import pytest

from jepax.training import speed
from jepax.training.dry_run import flops_by_verb
from jepax.training.setup import make_setup
from tests.contracts.shrink import shrunk


@pytest.fixture(scope="module")
def setup():
    return make_setup(shrunk("ijepa_fashion_mnist"))


def test_a_cpu_has_times_alone(setup):
    assert speed.make_speed_metrics(setup)(0.5) == {"perf/step_time": 0.5, "perf/images_per_sec": 32.0}


def test_an_accelerator_has_its_flops_and_fractions_of_its_peaks(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(speed, "NOMINAL_TFLOPS", {kind[:-1]: 1.0, kind: 2e-3})  # whole words count
    counts = flops_by_verb(setup)
    tflop = 16 * (counts["step"] - counts["optimizer"]) / jax.device_count() / 1e12

    # float32, which has no nominal peak; then bfloat16, whose peak was measured too.
    def values_in(dtype):
        train = replace(setup.config.train, compute_dtype=dtype)
        return speed.make_speed_metrics(replace(setup, config=replace(setup.config, train=train)))(0.5)

    values = values_in("float32")
    assert set(values) == {"perf/step_time", "perf/images_per_sec", "perf/tflops"}
    assert values["perf/tflops"] == pytest.approx(tflop / 0.5, rel=1e-6)
    speed.save_peak(kind, "bfloat16", 1e-3)
    values = values_in("bfloat16")
    assert values["perf/mfu"] == pytest.approx(tflop / 0.5 / 2e-3, rel=1e-6)
    assert values["perf/mfu_measured"] == pytest.approx(2 * values["perf/mfu"])


def test_a_measured_peak_is_kept_by_device_and_type(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speed.load_peak("card", "bfloat16") is None
    speed.save_peak("card", "bfloat16", 700.0)
    speed.save_peak("card", "float32", 50.0)
    assert (speed.load_peak("card", "bfloat16"), speed.load_peak("card", "float32")) == (700.0, 50.0)
    assert speed.load_peak("other", "bfloat16") is None
    (tmp_path / "jepax/peak_tflops.json").write_text("{torn")
    assert speed.load_peak("card", "bfloat16") is None
