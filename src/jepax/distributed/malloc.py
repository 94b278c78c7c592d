"""glibc settings that keep the memory of one training step for the next: on CPU, releasing it costs a fifth of a step.

XLA allocates a step's temporary memory again at every step. By default glibc serves such requests by `mmap` and returns
them at once, so the kernel maps and zeroes every page again: 39,000 page faults per step at 28 px, batch 128. A step on
one core took 323 ms before and 248 ms after, with equal losses (docs/log.md). The process keeps its peak memory.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # glibc, malloc.h


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def tune_malloc() -> bool:
    """Make glibc keep freed memory: one heap for all threads, no `mmap`, never trimmed. Returns True on success.

    Call it before `jax` is imported, which starts threads. Does nothing with another C library.
    """
    if (libc := _glibc()) is None:
        return False
    return all([libc.mallopt(ARENA_MAX, 1), libc.mallopt(MMAP_MAX, 0), libc.mallopt(TRIM_THRESHOLD, -1)])


def run_cpu_synchronously() -> None:
    """Make JAX run CPU programs in the calling thread; call it before a device is touched.

    XLA's own threads free a step's temporary memory shortly after its results are ready, when the next step may already
    have allocated its own. The step takes equally long. Programs on several devices and accelerators are not affected.
    """
    import jax  # here, since `tune_malloc` must come before it

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def trim_heap() -> None:
    """Return free memory to the kernel once: after compilation, 500 MB for the step of a ViT-Ti."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
