"""Describes the machine that a benchmark's numbers depend on, and measures its peak memory and peak FLOP/s."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike

import jepax
from jepax.bench.timing import WARMUP_CALLS, time_call
from jepax.distributed.multihost import cores

PROC_STATUS, PROC_CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MATRIX_SIZES = {"cpu": (768, 1536, 3072)}
DEFAULT_MATRIX_SIZES = (4096, 8192, 16384)
"""Sides of the square matrices on platforms that `MATRIX_SIZES` does not list."""
CHAIN_LENGTH = 8
"""Chained products in one program, so that the launch time is negligible."""


def describe_machine(*packages: str) -> dict[str, Any]:
    """Commit, versions (also of `packages`), processor, cores, device, and the load before the run."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "commit": git_commit(Path(jepax.__file__).parents[2]),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "equinox", "optax", *packages)}
        | {"jepax": jepax.__version__, "python": platform.python_version()},
        "cpu": name[1] if name else platform.processor(),
        "cores": cores(),
        "device": f"{jax.devices()[0]}, {jax.devices()[0].device_kind}",
        "load_average": os.getloadavg(),
    }


def git_commit(source: Path) -> str | None:
    """Commit of these sources; None outside a checkout, or without git."""
    if not (source / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=source, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def reset_peak_memory() -> None:
    """Restart the count of `peak_memory`; on a CPU and Linux only."""
    if jax.default_backend() == "cpu" and PROC_CLEAR_REFS.exists():
        PROC_CLEAR_REFS.write_text("5")


def peak_memory() -> int | None:
    """Peak bytes of the first device since the process began, or of the process on a CPU; None if not counted."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    found = re.search(r"VmHWM:\s+(\d+) kB", PROC_STATUS.read_text()) if PROC_STATUS.exists() else None
    return int(found[1]) * 1024 if found else None


def peak_flops(compute: DTypeLike, rounds: int = 5) -> float:
    """FLOP/s of one device: the fastest of a few matrix products in the compute dtype, with sums in float32."""
    best = 0.0
    for side in MATRIX_SIZES.get(jax.default_backend(), DEFAULT_MATRIX_SIZES):
        # Random: with constant matrices a GPU draws less power and exceeds the speed of any training.
        a = (jr.normal(jr.key(0), (side, side)) / side**0.5).astype(compute)
        chain = jax.jit(lambda a: lax.fori_loop(0, CHAIN_LENGTH, lambda _, x: x @ a, a))
        times = [time_call(lambda chain=chain, a=a: chain(a)) for _ in range(WARMUP_CALLS + rounds)]
        best = max(best, 2 * side**3 * CHAIN_LENGTH / min(times[WARMUP_CALLS:]))
    return best
