"""What the tests of full disks, other settings and bad paths share: a tiny run, its command, and disks of a few kB.

python -m tests.faults.limits ARGUMENTS is the command line in a process of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jepax import cli
from jepax.distributed import preemption
from jepax.io import checkpoint, lock
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig, CheckpointManager
from jepax.training import loop as training
from jepax.training.config import Config
from jepax.training.loop import train
from tests.contracts.shrink import shrunk
from tests.digest import state_digest

STEPS = 4
LINES = 5


def tiny(**train: object) -> Config:
    """Four steps, each saved and logged, all checkpoints kept, no evaluation on the way, one protocol at the end."""
    config = shrunk("ijepa_fashion_mnist")
    train = {
        "steps": STEPS,
        "log_every_steps": 1,
        "checkpoint": CheckpointConfig(every_steps=1, max_to_keep=99),
    } | train
    eval_ = replace(config.eval, online=replace(config.eval.online, every_steps=0), protocols=("knn",), batch_size=16)
    return replace(config, train=replace(config.train, **train), eval=eval_)


def written(config: Config, folder: Path) -> str:
    """Path of a YAML file with this config."""
    path = folder / "wanted.yaml"
    configs.save(config, path)
    return str(path)


@contextmanager
def persistent(folder: Path) -> Iterator[None]:
    """Within, compiled programs are kept in the folder, so that the next module need not compile them again."""
    names = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def kept_programs(compiled: Path) -> Iterator[None]:
    with persistent(compiled):
        yield


def command(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """What the command says on stderr; it must end with this exit code, and without a traceback."""
    capsys.readouterr()
    ended = 0
    try:
        cli.main([str(word) for word in argv])
    except SystemExit as end:
        ended = end.code
    said = capsys.readouterr().err
    assert ended == code and "Traceback" not in said, said
    return said


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The message, of at most five lines, of a command that ends with exit code 2; progress before it is left out."""
    return message(command(capsys, *argv))


def message(said: str) -> str:
    """The last lines, from `jepax:` on."""
    lines = said.splitlines()
    first = max(number for number, line in enumerate(lines) if line.startswith("jepax: "))
    assert len(lines) - first <= LINES and "Traceback" not in said, said
    return "\n".join(lines[first:])


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the states that commands end with; they do not evaluate them."""
    found, real = [], training.train

    def train(*given, **named):
        state = real(*given, **named)
        found.append(state_digest(state))
        return state

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr("jepax.commands.train.finalize", lambda *given: None)
    return found


def half_of(whole: "Whole", folder: Path) -> Path:
    """A copy of the tiny run that was cut off after two of its four steps."""
    run = folder / "run"
    shutil.copytree(whole.run, run)
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/{step:08d}")
    return run


def contents(run: Path) -> dict[str, bytes]:
    """Every file below the folder but the lock, which every command writes."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != lock.LOCK_FILE
    }


def sound(run: Path) -> list[int]:
    """Steps of the checkpoints, each of which must be sound."""
    found = checkpoint.list_steps(run / "checkpoints")
    assert [checkpoint.verify(run / "checkpoints", step) for step in found] == [[]] * len(found)
    return found


def parts(run: Path) -> list[Path]:
    """What was not finished, of checkpoints and of files."""
    return [path for path in run.rglob("*") if path.name.endswith(".part")]


class Disk:
    """A small one of its own, at `path`."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    def resize(self, size: str) -> None:
        mount("-o", f"remount,size={size}", str(self.path))

    def read_only(self) -> None:
        mount("-o", "remount,ro", str(self.path))

    def fill(self, leave: int = 0) -> Path:
        """Fills it up but for so many bytes, and returns the file that does: removing that frees it again."""
        path = self.path / "filling"
        with path.open("wb", buffering=0) as file:
            while True:
                try:
                    if file.write(b"\0" * 4096) < 4096:
                        break
                except OSError:
                    break
            file.truncate(max(file.tell() - leave, 0))
        return path

    def used(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Needs root: others take these tests inside a user namespace, see test_disks.py."""
    try:
        made = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here; test_disks.py takes these tests in a namespace where it can")
    yield made
    unmount(made.path)


@dataclass(frozen=True)
class Whole:
    """The tiny run when nothing happens."""

    run: Path
    digest: str

    def size(self) -> int:
        """Bytes of a checkpoint on a disk with pages of 4 kB."""
        found = (self.run / "checkpoints" / f"{STEPS:08d}").rglob("*")
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in found if path.is_file())


@pytest.fixture(scope="module")
def whole(kept_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    run = tmp_path_factory.mktemp("runs") / "whole"
    return Whole(run, state_digest(train(tiny(), run)))


def part(wanted: str, run: str, until: str) -> None:
    """Trains until this step is saved."""
    save = CheckpointManager.save

    def stop(saver: CheckpointManager, step: int, state: object, note: dict) -> None:
        save(saver, step, state, note)
        if step + 1 == int(until):  # it ends after the step that comes next
            os.kill(os.getpid(), signal.SIGTERM)

    CheckpointManager.save = stop
    with suppress(preemption.Preempted, KeyboardInterrupt):  # the latter after the last step
        train(configs.load(Config, Path(wanted)), Path(run))


if __name__ == "__main__":  # the workers of the loader import this file again
    if sys.argv[1] == "part":
        part(*sys.argv[2:])
    else:
        cli.main(sys.argv[1:])
