"""The command line killed, asked to end, and started twice: the same command goes on to the same result."""

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jepax.distributed import preemption
from jepax.io import checkpoint, lock, logger
from jepax.io import config_yaml as configs
from tests.faults.conftest import Processes, running
from tests.faults.runs import EVERY, STEPS, result, same, tiny

pytestmark = pytest.mark.slow_fault
ASKED = [signal.SIGTERM, signal.SIGINT]
LONG = 240
"""Seconds that a machine with other work may take for one command."""


class Command:
    """`jepax train` in one folder, again and again."""

    def __init__(self, processes: Processes, run: Path, recipe: str = "ijepa_fashion_mnist"):
        self.processes, self.run, self.config = processes, run, run.with_suffix(".yaml")
        configs.save(tiny(recipe), self.config)

    def start(self, **environment: str) -> subprocess.Popen:
        arguments = "train", str(self.config), "--run-dir", str(self.run)
        self.process = self.processes.start("command", *arguments, **environment)
        return self.process

    def said(self) -> str:
        return self.processes.said(self.process)

    def ends(self, code: int) -> None:
        assert self.process.wait(LONG) == code, self.said()

    def until(self, holds: Callable[[], bool], pause: float = 0.001) -> None:
        self.processes.until(holds, LONG, pause, of=self.process)

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.said())

    def until_step(self, step: int) -> None:
        self.until(lambda: any(line["step"] >= step for line in logger.read_metrics(self.run / "metrics.jsonl")))

    def until_saving(self, step: int) -> None:
        self.until(lambda: (self.run / f"checkpoints/{step:08d}{checkpoint.PARTIAL_SUFFIX}").is_dir())

    def newest(self) -> int:
        return max(checkpoint.list_steps(self.run / "checkpoints"), default=0)

    def kill(self) -> None:
        self.process.kill()
        self.ends(-signal.SIGKILL)

    def finishes(self) -> None:
        self.start()
        self.ends(0)


@pytest.fixture(scope="session")
def reference(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    with running(folder, compiled) as processes:
        Command(processes, folder / "run").finishes()
    assert result(folder / "run")[0] == STEPS
    return folder / "run"


@pytest.fixture
def command(reference: Path, processes: Processes, tmp_path: Path) -> Command:
    """Of the same config, in another folder; what it compiles is there already."""
    return Command(processes, tmp_path / "run")


@pytest.mark.fault(1, "the same run twice")
def test_the_same_seed_gives_the_same_bits(command, reference):
    command.finishes()
    same(command.run, reference)


@pytest.mark.fault(2, "SIGKILL at any moment")
def test_a_run_killed_at_random_moments_ends_the_same(command, reference):
    chance = random.Random(2)
    for part in range(6):
        command.start()
        if part % 3 == 0:  # imports, the folder, compilation
            time.sleep(chance.uniform(0.5, 6.0))
        else:
            command.until_step(min(command.newest() + chance.randrange(1, 90), STEPS - 10))
            time.sleep(chance.uniform(0.0, 0.1))
        command.kill()
    command.finishes()
    same(command.run, reference)


@pytest.mark.fault(3, "SIGKILL inside a save")
def test_a_run_killed_while_it_saves_ends_the_same(command, reference):
    """So and so long after a save began; and as soon as a checkpoint has its name, when it must be whole."""
    cut = 0
    for number, milliseconds in enumerate((0, 5, 20, 50, 100, None, None), 1):
        command.start()
        command.until_saving(2 * EVERY * number)
        if milliseconds is None:
            finished = command.run / f"checkpoints/{2 * EVERY * number:08d}"
            command.until(finished.exists, pause=0)
        else:
            time.sleep(milliseconds / 1000)
        command.kill()
        cut += len(checkpoint.partial_checkpoints(command.run / "checkpoints"))
        assert checkpoint.latest_valid(command.run / "checkpoints")[1] == {}
    assert cut > 0  # a save was met at work
    command.finishes()
    same(command.run, reference)


def compiling(command: Command) -> None:
    command.until_said(" examples on ")  # the header, before the first step
    time.sleep(1.0)


MOMENTS = {
    "compilation": compiling,
    "a step": lambda command: command.until_step(60),
    "a save": lambda command: command.until_saving(160),
}


@pytest.mark.fault(4, "SIGTERM or SIGINT")
@pytest.mark.parametrize("number", ASKED, ids=["SIGTERM", "SIGINT"])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(command, reference, tmp_path, number):
    for moment, reached in MOMENTS.items():
        cache = tmp_path / moment  # with nothing in it, so that compilation takes long
        command.start(**({"JAX_COMPILATION_CACHE_DIR": str(cache)} if moment == "compilation" else {}))
        reached(command)
        command.process.send_signal(number)
        command.ends(preemption.EXIT_RETRY)
        message = rf"stopped on request after step (\d+) of {STEPS}; rerun the same command to resume"
        saved = re.search(message, command.said())
        assert saved, (moment, command.said())
        assert command.newest() == int(saved[1]), moment
        assert (command.newest() == 1) == (moment == "compilation")
    command.start()
    command.until_said("trained encoder: knn")
    command.process.send_signal(number)
    command.ends(preemption.EXIT_RETRY)
    assert (
        "stopped on request; rerun the same command to resume" in command.said() and "Traceback" not in command.said()
    )
    assert not list(command.run.glob("figures/*"))
    command.finishes()
    assert (command.run / f"evals/step_{STEPS:08d}.json").is_file()
    same(command.run, reference)


@pytest.mark.fault(2, "SIGKILL and SIGTERM of a world model")
def test_a_world_model_killed_and_asked_to_end_ends_the_same(processes, tmp_path):
    """Its clips are simulated again at each start, and its running statistics are in the checkpoint."""
    whole, command = (Command(processes, tmp_path / name, "lewm_two_room") for name in ("whole", "run"))
    whole.finishes()
    for step in (60, 180):
        command.start()
        command.until_step(step)
        command.kill()
        command.start()
        command.until_saving(step + 60)
        command.process.send_signal(signal.SIGTERM)
        command.ends(preemption.EXIT_RETRY)
    command.finishes()
    assert "not evaluated: data.dataset=two_room has no labels" in command.said()
    same(command.run, whole.run)


@pytest.mark.fault(4, "a second SIGTERM or SIGINT")
@pytest.mark.parametrize("number", ASKED, ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_compilation_at_once(command, reference, tmp_path, number):
    command.start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    compiling(command)
    command.process.send_signal(number)
    command.until_said("again: ends at once")
    start = time.monotonic()
    command.process.send_signal(number)
    command.ends(128 + number)
    assert time.monotonic() - start < 3 and "compiled and ran" not in command.said()
    assert not lock.is_locked(command.run) and command.newest() == 0
    command.finishes()
    same(command.run, reference)


@pytest.mark.fault(20, "two runs in one folder")
def test_the_second_process_in_a_folder_is_refused(command, reference):
    """Both begin at the same moment; whichever comes second is told who is there, and changes nothing."""
    both = [command.start(), command.start()]
    end = time.monotonic() + LONG
    while all(process.poll() is None for process in both):
        assert time.monotonic() < end
        time.sleep(0.05)
    second, first = sorted(both, key=lambda process: process.poll() is None)
    assert second.wait() == 2 and first.poll() is None
    lines = [line for line in command.processes.said(second).splitlines() if not line.startswith("compil")]
    assert f"{command.run} is in use by process {first.pid} on " in lines[0] and len(lines) == 2, lines
    assert first.wait(LONG) == 0, command.processes.said(first)
    same(command.run, reference)
