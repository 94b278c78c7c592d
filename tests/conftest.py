"""Eight fake CPU devices, so that every test can hold one device against eight; quick compilation before speed."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
OLDER = ("--xla_cpu_use_fusion_emitters=false",) if version("jaxlib").startswith("0.10.") else ()
"""Halves the time to compile a step where XLA still has its older way to write fusions; later ones refuse the flag."""
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS, *OLDER])
os.environ.setdefault("JAX_PLATFORMS", "cpu")


CACHE, SHORTEST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def pytest_configure(config):
    """Programs are kept in a folder for this run of the tests, the smallest, too: many modules train the same tiny
    recipe, and every module begins without programs."""
    if not hasattr(config, "workerinput") and CACHE not in os.environ:  # the workers of xdist get it from their parent
        config.compiled = os.environ[CACHE] = tempfile.mkdtemp(prefix="jepax-tests-")
        os.environ.setdefault(SHORTEST, "0")


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        shutil.rmtree(config.compiled, ignore_errors=True)
        del os.environ[CACHE]


def pytest_collection_finish():
    """What is imported stays, and tracing makes many objects: with rarer passes, tests take a tenth less time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def no_slow_compilations():
    """On a busy machine any program may compile slowly; a command's output does not depend on it here."""
    from jepax.distributed import compile_cache

    compile_cache.SLOW_COMPILE_S = 3600.0


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops every compiled program after its module: each holds memory maps, and a process may have 65,530 of them."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
