"""What a benchmark's numbers depend on beside the code."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jepax
from jepax.hosts import cores


def machine(*packages: str) -> dict[str, Any]:
    """Commit, versions of ours and of `packages`, processor, cores, device, and the load before the run."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "commit": git.stdout.strip() or None,
        "versions": {package: version(package) for package in ("jax", "jaxlib", "equinox", "optax", *packages)}
        | {"jepax": jepax.__version__, "python": platform.python_version()},
        "cpu": name[1] if name else platform.processor(),
        "cores": cores(),
        "device": str(jax.devices()[0]),
        "load_average": os.getloadavg(),
    }
