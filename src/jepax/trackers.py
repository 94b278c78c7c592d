"""Views of the log elsewhere: Weights & Biases, Trackio, TensorBoard. None of them can slow or end a run.

Each tracker lives in a thread of its own, behind a queue of its own: its import, its start, every line and its end
happen there. `metrics.jsonl` is written before a line gets here, and holds everything whatever becomes of a tracker.
"""

import importlib
import importlib.util
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Literal

from jepax import files
from jepax.types import UserError

Tracker = Literal["wandb", "trackio", "tensorboard"]
Say = Callable[[str], None]
PACKAGES: dict[str, str] = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}
"""What must be installed for each; the extra of jepax that brings it has the tracker's name."""
PATIENCE = 20.0
"""Seconds that the end of a run waits for all its trackers together."""
WAITING = 1000
"""Lines that wait for a tracker that is slower than the run; what comes while so many wait is dropped."""
PROJECT, ID = "jepax", "tracker_id"
STAYS = "metrics.jsonl holds everything"


class Trackers:
    """Sends lines of metrics to trackers; use as a context manager.

    `run` is the run's folder: a run that is continued goes on in the same run of the tracker. `config` is shown there.
    `say` gets one line about what a tracker does not do, from the tracker's thread. Of many hosts one should have
    `names`. Raises `UserError` where a tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict, say: Say):
        for name in names:
            if not _installed(PACKAGES[name]):
                raise UserError(
                    f"train.trackers={name}: {PACKAGES[name]} is not installed;"
                    f' pip install "jepax[{name}]", or leave {name} out'
                )
        self.run = run
        self._threads = [_Thread(name, run, config, say) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Trackers":
        for thread in self._threads:
            thread.id = _id(self.run)
            thread.start()
        return self

    def send(self, step: int, values: dict) -> None:
        """Hands over a line, in microseconds. Lists become NAME/0, NAME/1, ...; what is no number is left out."""
        numbers = dict(_numbers({name: value for name, value in values.items() if name != "step"}))
        for thread in self._threads:
            thread.put((step, numbers))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the lines to leave, `PATIENCE` seconds at most."""
        for thread in self._threads:
            thread.end()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.leave(until)


class _Thread(threading.Thread):
    """One tracker. Whatever it raises is said once; a daemon, since what hangs must not keep the process alive."""

    def __init__(self, name: str, run: Path, config: dict, say: Say):
        super().__init__(name=f"tracker {name}", daemon=True)
        self.tracker, self.folder, self.config, self._tell = name, run, config, say
        self.lines: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue(WAITING)
        self.ended, self.left, self.failed = threading.Event(), False, False
        self.id, self.sent, self.lost = "", 0, 0

    def put(self, line: tuple[int, dict[str, float]]) -> None:
        """The run's side: never waits."""
        if self.failed:
            return
        self.sent += 1
        try:
            self.lines.put_nowait(line)
        except queue.Full:
            self.lost += 1

    def end(self) -> None:
        """The run's side: no more lines will come."""
        self.ended.set()

    def leave(self, until: float) -> None:
        """The run's side: waits until that time of the monotonic clock at most, and says what did not arrive."""
        self.join(max(until - time.monotonic(), 0))
        missing = self.lost + self.lines.qsize()
        if self.is_alive() and not self.failed:
            self.say(f"no answer within {PATIENCE:g} s of the run's end, {missing} lines were not sent; {STAYS}")
        elif missing and not self.failed:
            self.say(f"too slow for {missing} of {self.sent} lines, which were dropped; {STAYS}")
        self.left = True

    def say(self, text: str) -> None:
        if not self.left:
            self._tell(f"{self.tracker}: {text}")

    def run(self) -> None:
        """The tracker's side."""
        try:
            module = importlib.import_module(PACKAGES[self.tracker])
            log, finish = OPEN[self.tracker](module, self.folder, self.id, self.config)
            for step, numbers in self._waiting():
                log(numbers, step)
            finish()
        except BaseException as error:  # SystemExit too, which some raise where nobody is logged in
            self.failed = True
            self.say(f"{_reason(error)}; nothing more is sent there, training goes on, and {STAYS}")

    def _waiting(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The lines in their order, until the run has ended and none is left."""
        while True:
            try:
                yield self.lines.get(timeout=0.1)
            except queue.Empty:
                if self.ended.is_set() and self.lines.empty():
                    return


def _wandb(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    """wandb asks for a login at the terminal, which a thread must not, and waits for ever for an upload at the end."""
    offline = module.setup().settings.mode in ("offline", "dryrun", "disabled")
    if not offline and not module.login(prompt=False, verify=False):
        raise PermissionError("nobody is logged in; run wandb login before, or set WANDB_MODE=offline")
    settings = {"console": "off", "finish_timeout": PATIENCE}  # console: it would put itself before the progress bar
    named = {"project": PROJECT, "name": run.resolve().name, "id": id}
    module.init(**named, resume="allow", dir=str(run), config=config, settings=settings)
    return lambda numbers, step: module.log(numbers, step=step), module.finish


def _trackio(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    """Its runs have no other identity than their name."""
    module.init(project=PROJECT, name=f"{run.resolve().name}-{id}", resume="allow", config=config)
    return lambda numbers, step: module.log(numbers, step=step), module.finish


def _tensorboard(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    writer = module.SummaryWriter(str(run / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return log, writer.close


OPEN: dict[str, Callable[[ModuleType, Path, str, dict], tuple[Callable, Callable]]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
}
"""Each begins, or goes on with, the run, and returns what takes a line (numbers, step) and what ends it."""


def _id(run: Path) -> str:
    """The run's name for trackers: drawn once and kept in its folder, so that a moved run stays itself."""
    path = run / ID
    if not path.exists():
        files.atomic_write(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _numbers(values: dict) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from _numbers({f"{name}/{place}": inner for place, inner in enumerate(value)})
        elif isinstance(value, Real):
            yield name, float(value)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was loaded without a spec
        return True


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
