"""When a run saves, what it keeps, and one checkpoint at a time on its way to the disk while training goes on."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jepax import checkpoint, files
from jepax.distributed import multihost
from jepax.types import UserError

SCORE = "score"
"""Of a checkpoint's note: value, by the metric's name, of what the best one is kept by."""
PATIENCE = 1.0
"""Seconds that a save waits for the one before it until it says so."""


@dataclass(frozen=True)
class SaveConfig:
    """Which checkpoints are written and kept; the last step's always is."""

    every: int = 2000
    """Steps between checkpoints."""
    minutes: float | None = 15.0
    """Minutes after which one is written whatever the step; None: by steps alone."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_each: int | None = None
    """Checkpoints of the steps that this divides are kept for ever."""
    best: Literal["probe_top1", "knn_top1"] | None = None
    """A score of the online evaluation: the checkpoint at its highest is written, and kept."""

    def __post_init__(self) -> None:
        for name in ("every", "minutes", "keep", "keep_each"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"train.save.{name}={value} must be above 0")


class Saver:
    """Writes a run's checkpoints, each while training goes on; none is skipped, and none fails in silence."""

    def __init__(self, folder: Path, config: SaveConfig, say: Callable[[str], None], logs: Sequence[Path] = ()):
        """`logs`: files that are to be on the disk up to a step before a checkpoint of that step is."""
        self.folder, self.config, self.say, self.logs = folder, config, say, logs
        self._writing: checkpoint.Writing | None = None
        self._clock, self._saved = time.monotonic(), -1

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the checkpoint that is on its way; where something else went wrong, its own error is only said."""
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            self.say(f"warning: {error}")
        except multihost.PeerLostError:
            if kind is None:
                raise

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved, by their number.

        Raises `UserError` where a checkpoint could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        each = self.config.keep_each
        return step % self.config.every == 0 or (each is not None and step % each == 0)

    def late(self) -> bool:
        """Whether it is time to save by the clock, which begins anew when this is true."""
        now, minutes = time.monotonic(), self.config.minutes
        if minutes is None or now - self._clock <= 60 * minutes:
            return False
        self._clock = now
        return True

    def save(self, step: int, state: object, note: dict[str, Any]) -> None:
        """Begins to write the state after `step` steps. Waits for the checkpoint before, and says so where it is long.

        Raises `UserError` where one could not be written.
        """
        if step == self._saved:
            return
        self.wait(f"step {step}: the checkpoint waits for the one before it; the disk is slower than train.save.every")
        self._writing = checkpoint.Writing(self.folder, step, state, note, first=self.sync, then=self.prune)
        self._clock, self._saved = time.monotonic(), step

    def wait(self, saying: str = "") -> None:
        """Until everything is on the disk. Raises `UserError` where it could not be written."""
        if self._writing is None:
            return
        self._writing.join(PATIENCE)
        if saying and not self._writing.done():
            self.say(saying)
        writing, self._writing = self._writing, None
        writing.result()

    def sync(self) -> None:
        """Puts the logs on the disk: a step that is saved is not taken again, nor is its line written again."""
        for path in self.logs:
            files.sync(path)

    def prune(self) -> None:
        """Removes the checkpoints that the policy does not keep, and what was never finished.

        Each is called unfinished first: what a crash leaves of a removal is no damaged checkpoint.
        """
        steps = checkpoint.steps(self.folder)
        for step in set(steps) - kept(self.folder, steps, self.config):
            with suppress(OSError):  # it stays, then, as one too many
                (self.folder / f"{step:08d}").rename(self.folder / f"{step:08d}{checkpoint.PART}")
        for path in checkpoint.unfinished(self.folder):
            shutil.rmtree(path, ignore_errors=True)


def kept(folder: Path, steps: list[int], config: SaveConfig) -> set[int]:
    """Of these checkpoints: the newest, those that are kept for ever, and the best."""
    keep = set(steps[-config.keep :])
    keep |= {step for step in steps if config.keep_each and step % config.keep_each == 0}
    scores = {step: score_of(folder, step, config.best) for step in steps if config.best}
    known = {step: score for step, score in scores.items() if score is not None}
    return keep | ({max(known, key=lambda step: (known[step], step))} if known else set())


def score_of(folder: Path, step: int, name: str) -> float | None:
    """What the note of a checkpoint says of its score of this name, if anything."""
    try:
        return checkpoint.note(folder, step).get(SCORE, {}).get(name)
    except (OSError, ValueError, AttributeError):
        return None
