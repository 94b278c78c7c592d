"""Imports go downward only, and the public names of `import jepax` load when they are used."""

import subprocess
import sys
from pathlib import Path

import pytest

import jepax

LOWER = ("nn", "objectives", "masking", "views", "envs", "planners", "methods")
UPPER = ("training", "io", "distributed", "health", "export", "commands", "data", "evals", "viz", "sweeps", "bench")


def test_imports_go_downward_only():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def loaded(program):
    """Names of the modules that a fresh interpreter has after this program."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_lower_half_loads_nothing_of_the_upper_half():
    """To import a ViT must not load a signal handler."""
    modules = loaded("".join(f"import jepax.{name}\n" for name in LOWER))
    assert {f"jepax.{name}" for name in LOWER} <= set(modules)
    assert [name for name in modules if name.startswith(tuple(f"jepax.{part}" for part in UPPER))] == []


def test_the_package_alone_loads_nothing():
    modules = loaded("import jepax")
    assert [name for name in modules if name.startswith("jepax.")] == [] and "jax" not in modules


@pytest.mark.parametrize("name", jepax.__all__)
def test_every_public_name_resolves(name):
    value = getattr(jepax, name)
    assert name in jepax.__doc__ and name in dir(jepax)
    assert value.__name__.split(".")[-1] == name


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jepax' has no attribute 'trian'"):
        jepax.trian  # noqa: B018


def test_the_method_configs_of_the_package_are_public():
    configs = [config for config in jepax.MethodConfig.registry.values() if config.__module__.startswith("jepax.")]
    assert configs and all(getattr(jepax, config.__name__) is config for config in configs)
