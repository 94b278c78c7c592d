"""Real processes for the tests of faults: started, watched, and killed with all their children when a test ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SHARED = Path("/dev/shm")


@dataclass
class Processes:
    """What a test started, each in a session of its own."""

    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, module: str, *arguments: str, devices: int = 1, **environment: str) -> subprocess.Popen:
        """`python -m tests.faults.MODULE`, its output in a file that `said` reads."""
        flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
        with (self.folder / f"{len(self.started)}.out").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"tests.faults.{module}", *arguments],
                cwd=ROOT,
                env=self.environment | {"XLA_FLAGS": flags} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def group(
        self, module: str, *arguments: str, count: int = 2, heartbeat: int = 10, devices: int = 1, **environment: str
    ) -> list:
        """Several that find each other on a free port of this machine."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        common = environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        common["JEPAX_HEARTBEAT_SECONDS"] = str(heartbeat)
        return [self.start(module, *arguments, devices=devices, **common, JAX_PROCESS_ID=str(i)) for i in range(count)]

    def said(self, process: subprocess.Popen) -> str:
        return (self.folder / f"{self.started.index(process)}.out").read_text(errors="replace")

    def until(self, holds: Callable[[], bool], seconds: float, pause: float = 0.05) -> None:
        """Waits until it holds; fails after so many seconds, or as soon as a process has ended."""
        end = time.monotonic() + seconds
        while not holds():
            ended = [process for process in self.started if process.poll() is not None]
            assert not ended and time.monotonic() < end, "\n".join(map(self.said, self.started))
            time.sleep(pause)

    def end(self) -> None:
        for process in self.started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(10)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, which the processes of all these tests share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def processes(tmp_path: Path, compiled: Path) -> Iterator[Processes]:
    yield from found_in(tmp_path, compiled)


@pytest.fixture(scope="module")
def processes_of_module(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Processes]:
    yield from found_in(tmp_path_factory.mktemp("processes"), compiled)


def found_in(folder: Path, compiled: Path) -> Iterator[Processes]:
    """Processes whose output lies in the folder, ended afterwards."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": f"{ROOT / 'src'}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = Processes(folder, environment)
    yield found
    found.end()


def of_session(process: subprocess.Popen) -> list[int]:
    """The living processes of the session that it began: itself, its children, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(session) == process.pid and state != "Z":
            found.append(int(path.name))
    return found


def shared_by(process: subprocess.Popen) -> set[str]:
    """Names in /dev/shm that the processes of its session have mapped."""
    names = set()
    for pid in of_session(process):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        names |= {word.removeprefix(f"{SHARED}/") for word in maps.split() if word.startswith(f"{SHARED}/")}
    return names
