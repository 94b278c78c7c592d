"""Decides when a run saves and which checkpoints it keeps, and writes one at a time while training continues.

Orbax's own manager is not used for this: it renames a checkpoint to its final name before our manifest can be written,
so a kill in between would leave a checkpoint that counts as corrupt, and its `save` may skip a step silently.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jepax.distributed import multihost
from jepax.io import atomic, checkpoint
from jepax.types import UserError

METRICS_KEY = "score"
"""Key of a checkpoint's metadata for `{best_metric: value}`, present if the checkpoint was the best at its time."""
SLOW_SAVE_WARNING_S = 1.0
"""Seconds that a save waits for the one before it without a warning."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept; the last step's is always written."""

    every_steps: int = 2000
    """Steps between checkpoints."""
    every_minutes: float | None = 15.0
    """Minutes after which one is written whatever the step; None: by steps only."""
    max_to_keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_period: int | None = None
    """Checkpoints of steps that are multiples of this are kept forever."""
    best_metric: Literal["val/probe_top1", "val/knn_top1"] | None = None
    """Score of the online evaluation: the checkpoint with the highest is written, and kept."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "max_to_keep", "keep_period"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"train.checkpoint.{name}={value} must be above 0")


class CheckpointManager:
    """Writes a run's checkpoints while training continues. None is skipped, and none fails silently."""

    def __init__(self, folder: Path, config: CheckpointConfig, print: Callable[[str], None], logs: Sequence[Path] = ()):
        """`logs`: files that must be on the disk up to a step before a checkpoint of that step is."""
        self.folder, self.config, self.print, self.logs = folder, config, print, logs
        self._pending: futures.Future[Path] | None = None
        self._last_save, self._saved_step = time.monotonic(), -1

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the pending checkpoint; its error does not hide another one."""
        try:
            self.wait()
        except (UserError, multihost.PeerLostError) as error:
            if kind is None:
                raise
            self.print(f"warning: {error}")

    def should_save(self, step: int) -> bool:
        """True if the number of `step` calls for a checkpoint; `loop.py` also saves at other steps, such as the last.

        Raises `UserError` if a checkpoint could not be written.
        """
        # Called at each step, so an error of the checkpoint being written ends the run soon, not at the next save.
        if self._pending is not None and self._pending.done():
            self.wait()
        period = self.config.keep_period
        return step % self.config.every_steps == 0 or (period is not None and step % period == 0)

    def timer_expired(self) -> bool:
        """True if `every_minutes` have passed; the clock then restarts."""
        now, minutes = time.monotonic(), self.config.every_minutes
        if minutes is None or now - self._last_save <= 60 * minutes:
            return False
        self._last_save = now
        return True

    def save(self, step: int, state: object, metadata: dict[str, Any]) -> None:
        """Start to write the state after `step` steps, once the checkpoint before it is on the disk.

        Raises `UserError` if one could not be written.
        """
        # A step that two reasons save, such as the clock and a request to stop, is written once.
        if step == self._saved_step:
            return

        # One at a time: while one is written, the host has a copy of the state.
        slow = "the checkpoint waits for the one before it; the disk is slower than train.checkpoint.every_steps"
        self.wait(f"step {step}: {slow}")

        # From here on in a thread. Logs are flushed before the checkpoint counts, old ones are removed after it does.
        self._pending = checkpoint.save_async(
            self.folder, step, state, metadata, before_commit=self.fsync_logs, after_commit=self.garbage_collect
        )
        self._last_save, self._saved_step = time.monotonic(), step

    def wait(self, warning: str = "") -> None:
        """Wait for the pending checkpoint. Raises `UserError` if it could not be written."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        futures.wait([pending], SLOW_SAVE_WARNING_S)
        if warning and not pending.done():
            self.print(warning)
        pending.result()

    def fsync_logs(self) -> None:
        """Flush the logs to the disk, since a saved step is not repeated and so not logged again."""
        for path in self.logs:
            atomic.fsync(path)

    def garbage_collect(self) -> None:
        """Remove unfinished checkpoints, and those that the policy does not keep."""
        # Each is renamed to STEP.part first, so that a crash during removal leaves no corrupt checkpoint.
        steps = checkpoint.list_steps(self.folder)
        for step in set(steps) - steps_to_keep(self.folder, steps, self.config):
            path = checkpoint.step_dir(self.folder, step)
            with suppress(OSError):  # a leftover is harmless
                path.rename(path.with_name(path.name + checkpoint.PARTIAL_SUFFIX))
        for path in checkpoint.partial_checkpoints(self.folder):
            shutil.rmtree(path, ignore_errors=True)


def steps_to_keep(folder: Path, steps: list[int], config: CheckpointConfig) -> set[int]:
    """The newest of `steps`, the periodic ones, and the best."""
    # `steps` are in ascending order. Of equal scores the later step is the best.
    newest = steps[-config.max_to_keep :]
    periodic = [step for step in steps if config.keep_period and step % config.keep_period == 0]
    scores = {step: _score(folder, step, config.best_metric) for step in steps if config.best_metric}
    best = sorted((score, step) for step, score in scores.items() if score is not None)[-1:]
    return {*newest, *periodic, *(step for _, step in best)}


def _score(folder: Path, step: int, name: str | None) -> float | None:
    try:
        return checkpoint.metadata(folder, step).get(METRICS_KEY, {}).get(name)
    except (OSError, ValueError, AttributeError):
        return None
