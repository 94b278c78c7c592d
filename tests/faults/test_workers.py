"""A killed worker of the loader, and a killed reader with workers."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.conftest import SHARED, Processes, of_session, shared_by

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="looks into /proc and /dev/shm")


def reading(processes: Processes) -> subprocess.Popen:
    reader = processes.start("reader")
    processes.until(lambda: "reading" in processes.said(reader), 60)
    return reader


def workers_of(reader: subprocess.Popen) -> list[int]:
    pids = [pid for pid in of_session(reader) if pid != reader.pid]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def left(reader: subprocess.Popen, names: set[str], seconds: float) -> tuple[list[int], set[str]]:
    """Processes and shared memory that are still there after so many seconds; looks often, and returns early."""
    end = time.monotonic() + seconds
    while True:
        alive, shared = of_session(reader), {name for name in names if (SHARED / name).exists()}
        if time.monotonic() > end or not (alive or shared):
            return alive, shared
        time.sleep(0.1)


@pytest.mark.slow_fault
@pytest.mark.fault(11, "a data worker is killed")
def test_a_killed_worker_ends_the_reader_with_a_line_and_leaves_nothing(processes):
    reader = reading(processes)
    names, workers = shared_by(reader), workers_of(reader)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert reader.wait(15) == 2
    assert "one of the data.num_workers=2 processes that read the data was ended by SIGKILL" in processes.said(reader)
    assert left(reader, names, 10) == ([], set())


@pytest.mark.slow_fault
@pytest.mark.fault(11, "a data worker is killed")
def test_a_killed_reader_leaves_neither_workers_nor_shared_memory(processes):
    reader = reading(processes)
    names = shared_by(reader)
    reader.kill()
    reader.wait(10)
    assert left(reader, names, 15) == ([], set())


@pytest.mark.slow_fault
@pytest.mark.fault(11, "a data worker is killed")
def test_training_ends_when_a_worker_is_killed(processes, tmp_path):
    changes = '{"train": {"steps": 100000, "log_every_steps": 5}, "data": {"num_workers": 2}}'
    run = processes.start("driver", str(tmp_path / "run"), changes)
    log = tmp_path / "run" / "metrics.jsonl"
    processes.until(lambda: log.exists() and log.read_text().count("\n") > 2, 120)
    names = shared_by(run)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert run.wait(20) == 2, processes.said(run)
    assert "was ended by SIGKILL" in processes.said(run)
    assert left(run, names, 10) == ([], set())
