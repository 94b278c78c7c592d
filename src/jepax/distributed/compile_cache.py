"""JAX's persistent compilation cache in the user's cache folder, and XLA options for training programs."""

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ENV_VAR = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own variable; if it is set, its folder is used. `JAX_ENABLE_COMPILATION_CACHE=false` disables the cache."""
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""XLA options for training programs. On GPU: use cuBLAS (not Triton) GEMMs, which fuse bias and residual into the
epilogue, and do not merge dot products, whose results would be copied into separate arrays. Ignored elsewhere."""
QUICK_COMPILE_OPTIONS = COMPILER_OPTIONS | {"xla_gpu_autotune_level": 0}
"""XLA options for programs that run for seconds. On GPU: take cuBLAS's first choice for every matrix product; to time
the alternatives takes longer than it saves."""
MAX_BYTES = 4 * 10**9
SLOW_COMPILE_S = 2.0
"""Seconds after which a program that is being compiled is named."""
LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED_EVENT = "/jax/core/compile/backend_compile_duration"
"""JAX's events before and after XLA compiles a program, or reads it from the cache."""


def enable_compile_cache() -> None:
    """Set the folder `$XDG_CACHE_HOME/jepax/xla`, or `~/.cache/jepax/xla`; call it before `jax` is imported.

    One folder serves every kind of CPU and GPU: JAX's key includes their features. Silently disabled if the folder is
    not writable.
    """
    if ENV_VAR in os.environ:
        return
    with suppress(OSError, RuntimeError):  # the latter: no home folder
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "jepax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder, MAX_BYTES)
        if os.access(folder, os.W_OK):
            os.environ[ENV_VAR] = str(folder)


def prune(folder: Path, max_bytes: int) -> None:
    """Remove the oldest files until the others fit in `max_bytes`.

    JAX's own limit (`jax_compilation_cache_max_size`) requires filelock, and in jax 0.10 one process killed during a
    write disables all later writes to the folder (jax-ml/jax#39880).
    """
    files = [(entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder)]
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > max_bytes:
            with suppress(FileNotFoundError):  # another process removed it
                os.remove(path)


class SlowCompilations:
    """Names each program that takes longer than `SLOW_COMPILE_S` to compile, and prints its seconds when it is done.

    A listener of JAX's events: `jax.monitoring.register_event_duration_secs_listener`.
    """

    def __init__(self, print: Callable[[str], None]):
        self.print = print
        self._timers: dict[int, threading.Timer] = {}
        """By thread: several may compile at a time."""

    def __call__(self, event: str, seconds: float, **metadata: object) -> None:
        if event not in (LOWERED_EVENT, COMPILED_EVENT):
            return
        name = re.sub(r"^jit\((.*)\)$", r"\1", str(metadata.get("fun_name", "")))  # "jit(_train_step)"
        name = "a program" if name in ("", "<lambda>") else name.removeprefix("jit_").strip("_").replace("_", " ")
        thread = threading.get_ident()
        if timer := self._timers.pop(thread, None):
            timer.cancel()
        if event == LOWERED_EVENT:
            self._timers[thread] = timer = threading.Timer(SLOW_COMPILE_S, self.print, [f"compiling {name} ..."])
            timer.daemon = True
            timer.start()
        elif seconds > SLOW_COMPILE_S:
            self.print(f"compiled {name} in {seconds:.0f} s")
