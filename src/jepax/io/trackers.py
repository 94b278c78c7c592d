"""Copies the log to Weights & Biases, Trackio and TensorBoard. None of them can slow or stop a run.

Each tracker runs in a daemon thread behind a bounded queue, from its import to its last call, so that one that fails or
hangs affects neither training nor the others. `metrics.jsonl` is written first and is complete in any case.
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
from types import ModuleType
from typing import Literal

from jepax.io import atomic
from jepax.types import UserError

TrackerName = Literal["wandb", "trackio", "tensorboard"]
TRACKER_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboardX"}
"""Package of each tracker; the extra of jepax that installs it has the tracker's name."""
CLOSE_TIMEOUT_S = 20.0
"""Seconds that the end of a run waits for all trackers together."""
QUEUE_SIZE = 1000
"""Steps queued for a tracker that is slower than the run; further ones are dropped."""


class Trackers:
    """Context manager that sends metrics to trackers. A resumed run continues in the tracker's same run.

    `print` receives at most one message about each tracker, from its thread: that it fails, hangs or is too slow. Only
    the main process should name any. Raises `UserError` if a tracker's package is not installed.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict, print: Callable[[str], None]):
        for name in names:
            if importlib.util.find_spec(TRACKER_PACKAGES[name]) is None:
                raise UserError(
                    f"train.loggers={name}: {TRACKER_PACKAGES[name]} is not installed;"
                    f' pip install "jepax[{name}]", or leave {name} out'
                )
        self._workers = [_Worker(name, run, config, print) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Trackers":
        for worker in self._workers:
            worker.start()
        return self

    def send(self, step: int, values: dict) -> None:
        """Queue one step's metrics. Lists become NAME/0, NAME/1, ...; other non-numeric values are dropped."""
        numbers = dict(_flatten_numbers({name: value for name, value in values.items() if name != "step"}))
        for worker in self._workers:
            worker.put(step, numbers)

    def __exit__(self, *_: object) -> None:
        """Wait until everything is sent, at most `CLOSE_TIMEOUT_S` seconds."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for worker in self._workers:
            worker.queue.put(None)  # the end
        for worker in self._workers:
            worker.close(deadline)


class _Worker(threading.Thread):
    """Thread and queue of one tracker. A daemon, so that a hanging tracker does not keep the process alive."""

    def __init__(self, tracker: str, folder: Path, config: dict, print: Callable[[str], None]):
        super().__init__(name=f"tracker {tracker}", daemon=True)
        self.tracker, self.folder, self.config, self._print = tracker, folder, config, print
        self.queue: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self.id, self.sent, self.dropped, self.muted = _run_id(folder), 0, 0, False

    def run(self) -> None:
        try:
            module = importlib.import_module(TRACKER_PACKAGES[self.tracker])
            log, finish = TRACKER_OPENERS[self.tracker](module, self.folder, self.id, self.config)
            for step, numbers in iter(self.queue.get, None):
                log(numbers, step=step)
            finish()
        except BaseException as error:  # also SystemExit, which some raise if nobody is logged in
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.report(f"{reason}; nothing more is sent there, training goes on")

    def put(self, step: int, numbers: dict[str, float]) -> None:
        """Queue metrics without blocking."""
        self.sent += 1
        if self.queue.qsize() < QUEUE_SIZE:
            self.queue.put((step, numbers))
        else:
            self.dropped += 1

    def close(self, deadline: float) -> None:
        """Wait until `deadline` on the monotonic clock, and report the steps that were not sent."""
        self.join(max(deadline - time.monotonic(), 0))
        if self.is_alive():
            missing = self.dropped + max(self.queue.qsize() - 1, 0)  # the last entry ends the thread
            self.report(f"no answer within {CLOSE_TIMEOUT_S:g} s of the run's end, {missing} steps were not sent")
        elif self.dropped:
            self.report(f"too slow for {self.dropped} of {self.sent} steps, which were dropped")
        self.muted = True

    def report(self, message: str) -> None:
        """Print the first message only, and none after `close`."""
        if not self.muted:
            self.muted = True
            self._print(f"{self.tracker}: {message}; metrics.jsonl is complete")


# One function per tracker: it opens or resumes the run, and returns `log(numbers, step=...)` and `finish()`.


def _open_wandb(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    # wandb must not prompt for a login, wait indefinitely for its upload, or wrap the terminal.
    offline = module.setup().settings.mode in ("offline", "dryrun", "disabled")
    if not offline and not module.login(prompt=False, verify=False):
        raise PermissionError("nobody is logged in; run wandb login before, or set WANDB_MODE=offline")
    settings = {"console": "off", "finish_timeout": CLOSE_TIMEOUT_S}
    name = run.resolve().name
    module.init(project="jepax", name=name, id=id, resume="allow", dir=str(run), config=config, settings=settings)
    return module.log, module.finish


def _open_trackio(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    # The name alone identifies a run of trackio, so it includes the id.
    module.init(project="jepax", name=f"{run.resolve().name}-{id}", resume="allow", config=config)
    return module.log, module.finish


def _open_tensorboard(module: ModuleType, run: Path, id: str, config: dict) -> tuple[Callable, Callable]:
    writer = module.SummaryWriter(str(run / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return log, writer.close


TRACKER_OPENERS = {"wandb": _open_wandb, "trackio": _open_trackio, "tensorboard": _open_tensorboard}


def _run_id(run: Path) -> str:
    """The run's id for trackers: drawn once and stored in its folder, so that a moved run keeps it."""
    path = run / "tracker_id"
    if not path.exists():
        atomic.atomic_write(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _flatten_numbers(values: dict) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from _flatten_numbers({f"{name}/{index}": element for index, element in enumerate(value)})
        elif isinstance(value, Real):
            yield name, float(value)
