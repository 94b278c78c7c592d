"""Speed of a run's steps: examples per second and, on accelerators, TFLOP/s and model FLOPs utilization (MFU)."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from jepax.flops import count_flops
from jepax.io import atomic
from jepax.io.logger import MetricValues
from jepax.methods import Method
from jepax.training.setup import Setup
from jepax.trees import trainable

NOMINAL_TFLOPS = {
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100": 989.5,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100": 312.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
}
"""Peak of dense bfloat16 matrix products with float32 sums, in TFLOP/s, from the vendors' data sheets. The first name
whose words the device's own begins with counts."""


def make_speed_metrics(setup: Setup) -> Callable[[float], MetricValues]:
    """Return a function of the seconds per step that returns the metrics `perf/...`.

    `perf/tflops` is per device, of the matrix products that the model needs; `perf/mfu` is its fraction of the device's
    nominal peak, `perf/mfu_measured` of the peak that `jepax bench` measured on such a device. Without these on a CPU.
    """
    batch_size = setup.config.train.batch_size
    dtype, kind = jnp.dtype(setup.context.compute_dtype).name, jax.devices()[0].device_kind
    nominal = next((peak for name, peak in NOMINAL_TFLOPS.items() if f"{kind} ".startswith(f"{name} ")), None)
    nominal = None if "Laptop" in kind else nominal  # slower than the card of the same name
    peaks = {"perf/mfu": nominal if dtype == "bfloat16" else None, "perf/mfu_measured": load_peak(kind, dtype)}
    # Counted at the first call, when the device computes already.
    tflop = cache(lambda: gradient_flops(setup) / jax.device_count() / 1e12)

    def speed_metrics(seconds: float) -> MetricValues:
        values = {"perf/step_time": seconds, "perf/images_per_sec": batch_size / seconds}
        if jax.default_backend() == "cpu":
            return values
        values["perf/tflops"] = tflop() / seconds
        return values | {name: values["perf/tflops"] / peak for name, peak in peaks.items() if peak}

    return speed_metrics


def gradient_flops(setup: Setup) -> float:
    """FLOPs of the matrix products in one step's forward and backward pass, over the global batch."""

    def gradient(method: Method, batch: Any) -> Method:
        params, rest = eqx.partition(method, trainable(method))
        return jax.grad(lambda p: eqx.combine(p, rest).loss(batch, key=jr.key(0))[0])(params)

    return count_flops(gradient, setup.abstract_state().method, setup.abstract_batch(setup.config.train.batch_size))


def save_peak(kind: str, dtype: str, tflops: float) -> None:
    """Keep the measured peak of a kind of device in the user's cache folder, if it can be written."""
    with suppress(OSError, RuntimeError):  # the latter: no home folder
        _peaks_file().parent.mkdir(parents=True, exist_ok=True)
        atomic.atomic_write(_peaks_file(), json.dumps(_read_peaks() | {f"{kind} {dtype}": tflops}, indent=1) + "\n")


def load_peak(kind: str, dtype: str) -> float | None:
    """The measured peak in TFLOP/s; None if `jepax bench` has not measured it here."""
    return _read_peaks().get(f"{kind} {dtype}")


def _peaks_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepax" / "peak_tflops.json"


def _read_peaks() -> dict[str, float]:
    try:
        return json.loads(_peaks_file().read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
