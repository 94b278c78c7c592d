"""Real processes for the tests of faults: started, watched, and killed with all their children when a test ends; and
a table of what was tested."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.faults.runs")
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

    def until(
        self, holds: Callable[[], bool], seconds: float, pause: float = 0.05, *, of: subprocess.Popen | None = None
    ) -> None:
        """Waits until it holds; fails after so many seconds, or as soon as a process, or that one, has ended."""
        end, watched = time.monotonic() + seconds, [of] if of else self.started
        while not holds():
            ended = [process for process in watched if process.poll() is not None]
            assert not ended and time.monotonic() < end, "\n".join(map(self.said, watched))
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


@contextmanager
def running(folder: Path, compiled: Path) -> Iterator[Processes]:
    """Within, processes may be started; their outputs are written into the folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": f"{ROOT / 'src'}",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = Processes(folder, environment)
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
def processes(tmp_path: Path, compiled: Path) -> Iterator[Processes]:
    with running(tmp_path, compiled) as found:
        yield found


@pytest.fixture(scope="module")
def processes_of_module(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Processes]:
    with running(tmp_path_factory.mktemp("processes"), compiled) as found:
        yield found


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The kinds of fault travel with a test's reports, from another process too."""
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties.append(("fault", list(mark.args)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per kind of fault, and the share of the tests that passed."""
    table = Table()
    reports = chain.from_iterable(terminalreporter.stats.values())  # and the tests that were deselected
    for report in (each for each in reports if isinstance(each, pytest.TestReport)):
        for name, value in report.user_properties:
            if name == "fault":
                table.add(report, *value)
    if table.kinds:
        terminalreporter.section("faults")
        terminalreporter.write_line(table.text())


@dataclass
class Kind:
    """What became of the tests of one kind of fault."""

    titles: dict[str, None] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    """By test: the worst of its reports."""
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)


class Table:
    """Of the tests that ran, by the number of their kind of fault."""

    ORDER = ("passed", "skipped", "failed")

    def __init__(self) -> None:
        self.kinds: dict[int, Kind] = {}

    def add(self, report: pytest.TestReport, number: int, title: str) -> None:
        kind = self.kinds.setdefault(number, Kind())
        kind.titles[title] = None
        kind.seconds += report.duration
        both = report.outcome, kind.outcomes.get(report.nodeid, "passed")
        kind.outcomes[report.nodeid] = max(both, key=self.ORDER.index)

    def text(self) -> str:
        lines = ["number  passed  failed  skipped  seconds  what happens"]
        for number, kind in sorted(self.kinds.items()):
            passed, failed, skipped = map(kind.count, ("passed", "failed", "skipped"))
            numbers = f"{number:6}  {passed:6}  {failed:6}  {skipped:7}  {kind.seconds:7.1f}"
            lines.append(f"{numbers}  {'; '.join(kind.titles)}")
        passed, failed = (sum(kind.count(each) for kind in self.kinds.values()) for each in ("passed", "failed"))
        rate = f"{100 * passed / (passed + failed):.1f} %" if passed + failed else "none ran"
        return "\n".join([*lines, f"passed: {passed} of {passed + failed}, {rate}"])
