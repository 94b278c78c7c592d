"""Describes the commit, versions and machine that a benchmark's numbers depend on."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jepax
from jepax.distributed.multihost import cores


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
