"""Measures peak memory: of a device that counts it, else of this process."""

import re
from pathlib import Path

import jax

PROC_STATUS, PROC_CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Restart the count of `peak_bytes`; on a CPU and Linux only."""
    if jax.default_backend() == "cpu" and PROC_CLEAR_REFS.exists():
        PROC_CLEAR_REFS.write_text("5")


def peak_bytes() -> int | None:
    """Peak of the first device since the process began, or of the process on a CPU; None if it is not counted."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    found = re.search(r"VmHWM:\s+(\d+) kB", PROC_STATUS.read_text()) if PROC_STATUS.exists() else None
    return int(found[1]) * 1024 if found else None
