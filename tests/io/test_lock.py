"""One process per run folder."""

import subprocess
import sys
import threading

import pytest

from jepax.io import lock
from jepax.types import UserError

HOLD = """
import sys, time, pathlib
from jepax.io import lock
with lock.run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path, other):
    assert lock.is_locked(tmp_path)
    with (
        pytest.raises(UserError, match=rf"(?s)in use by process {other.pid} on .*another --run-dir"),
        lock.run_lock(tmp_path),
    ):
        pass
    assert lock.is_locked(tmp_path)


def test_a_lock_ends_with_its_holder_however_that_ends(tmp_path, other):
    other.kill()
    other.wait()
    assert not lock.is_locked(tmp_path)
    with lock.run_lock(tmp_path):
        assert lock.is_locked(tmp_path)
    assert not lock.is_locked(tmp_path)


def test_it_may_be_taken_again_inside(tmp_path):
    with lock.run_lock(tmp_path):
        with lock.run_lock(tmp_path):
            pass
        assert lock.is_locked(tmp_path)
    assert not lock.is_locked(tmp_path) and not lock.is_locked(tmp_path / "nowhere")


def test_whoever_has_just_taken_it_is_named(tmp_path):
    """The lock is taken before its holder's name is in the file."""
    (tmp_path / lock.LOCK_FILE).touch()
    threading.Timer(0.2, (tmp_path / lock.LOCK_FILE).write_text, ["process 7\n"]).start()
    assert lock.owner(tmp_path) == "process 7"
