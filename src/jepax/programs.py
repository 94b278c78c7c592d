"""Compiled programs: what the compiler is told, and that they stay on disk.

So the same command begins its first step in seconds the second time.
"""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own: where it is set, it holds. `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing."""
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""For the compiler, of programs that train: on a GPU, matrix products by cuBLAS alone, which then adds the bias and
what a block was given, and no products joined whose results it would copy apart. Other devices take no notice."""
LIMIT = 4 * 10**9
"""Bytes that are kept; the oldest programs go first."""


def enable_compile_cache() -> None:
    """Lets JAX keep compiled programs in the user's cache. Call it before `jax` is imported.

    Where that cannot be written, nothing is kept and nothing is said: it only saves time.
    """
    if VARIABLE in os.environ:
        return
    with suppress(OSError, RuntimeError):  # the latter: nobody's home
        folder = cache() / processor()
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder, LIMIT)
        if os.access(folder, os.W_OK):
            os.environ[VARIABLE] = str(folder)


def cache() -> Path:
    """The folder of ours in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "jepax" / "programs"


def processor() -> str:
    """A name for the processor's kind and features: hosts of another kind may share a home, but no programs."""
    described = [platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]


def prune(folder: Path, limit: int) -> None:
    """Removes the files that were not written lately, until the others take no more than so many bytes."""
    files = [(entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder)]
    kept = 0
    for _, size, path in sorted(files, reverse=True):
        kept += size
        if kept > limit:
            with suppress(FileNotFoundError):  # another process removed it
                os.remove(path)
