"""Where compiled programs are kept."""

import os
import subprocess
import sys

import pytest

from jepax import programs


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv(programs.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    os.environ.pop(programs.VARIABLE, None)


def test_programs_are_kept_in_the_users_cache(home, monkeypatch):
    programs.enable_compile_cache()
    assert os.environ[programs.VARIABLE] == str(home / ".cache/jepax/programs" / programs.processor())
    monkeypatch.delenv(programs.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    programs.enable_compile_cache()
    assert os.environ[programs.VARIABLE].startswith(str(home / "elsewhere/jepax/programs"))


def test_a_folder_that_is_set_holds(home, monkeypatch):
    monkeypatch.setenv(programs.VARIABLE, "mine")
    programs.enable_compile_cache()
    assert os.environ[programs.VARIABLE] == "mine" and not (home / ".cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(home):
    (home / ".cache").write_text("a file in the way")
    programs.enable_compile_cache()
    assert programs.VARIABLE not in os.environ


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(("newest", "newer", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    programs.prune(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "newest"]


def test_a_second_command_reads_what_the_first_compiled(home):
    """Both processes of a user with an empty home."""
    code = (
        "from jepax.distributed.compile_cache import enable_compile_cache; enable_compile_cache()\n"
        "import jax, jax.numpy as jnp\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append('cache_hits' in name))\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()\n"
        "print(sum(hits))\n"
    )
    first, second = (int(subprocess.check_output([sys.executable, "-c", code])) for _ in range(2))
    assert first == 0 and second >= 1
