"""Where compiled programs are kept."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from jepax.distributed import compile_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv(compile_cache.ENV_VAR, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield tmp_path
    os.environ.pop(compile_cache.ENV_VAR, None)


def test_the_cache_is_in_the_users_cache_folder(home, monkeypatch):
    compile_cache.enable_compile_cache()
    assert os.environ[compile_cache.ENV_VAR] == str(home / ".cache/jepax/xla")
    monkeypatch.delenv(compile_cache.ENV_VAR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    compile_cache.enable_compile_cache()
    assert os.environ[compile_cache.ENV_VAR] == str(home / "elsewhere/jepax/xla")


def test_a_folder_that_is_set_holds(home, monkeypatch):
    monkeypatch.setenv(compile_cache.ENV_VAR, "mine")
    compile_cache.enable_compile_cache()
    assert os.environ[compile_cache.ENV_VAR] == "mine" and not (home / ".cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(home):
    (home / ".cache").write_text("a file in the way")
    compile_cache.enable_compile_cache()
    assert compile_cache.ENV_VAR not in os.environ


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(("newest", "newer", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    compile_cache.prune(tmp_path, 25)
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


def test_programs_that_compile_slowly_are_named(monkeypatch):
    monkeypatch.setattr(compile_cache, "SLOW_COMPILE_S", 0.05)
    printed = []
    listener = compile_cache.SlowCompilations(printed.append)
    lowered, compiled = compile_cache.LOWERED_EVENT, compile_cache.COMPILED_EVENT
    for name in ("jit(_slow_step)", "jit(jit_slow_step)"):
        listener(lowered, 0.1, fun_name=name)
        time.sleep(0.2)
        assert printed == ["compiling slow step ..."]
        listener(compiled, 3.2, fun_name=name)
        assert printed[1:] == ["compiled slow step in 3 s"]
        printed.clear()
    listener(lowered, 0.1, fun_name="jit(<lambda>)")
    listener(compiled, 3.2, fun_name="jit(<lambda>)")
    assert printed == ["compiled a program in 3 s"]
    printed.clear()
    listener(lowered, 0.1, fun_name="jit(quick)")
    listener(compiled, 0.01, fun_name="jit(quick)")
    time.sleep(0.2)
    assert printed == []


def test_jax_reports_the_events_by_these_names():
    events = []

    def listener(event, seconds, **metadata):
        if event in (compile_cache.LOWERED_EVENT, compile_cache.COMPILED_EVENT):
            events.append((event, metadata.get("fun_name")))

    def some_program(x):
        return jnp.sin(x) @ x

    x = jnp.ones((8, 8))
    jax.monitoring.register_event_duration_secs_listener(listener)
    jax.jit(some_program)(x)
    jax.monitoring.unregister_event_duration_listener(listener)
    name = "jit(some_program)"
    assert events == [(compile_cache.LOWERED_EVENT, name), (compile_cache.COMPILED_EVENT, name)]
