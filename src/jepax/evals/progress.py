"""What an evaluation tells while it works: a line when something begins, and a bar with the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jepax.io.logger import PRINT_EVERY_S, format_duration


class ProgressReporter:
    """To the person at the terminal, on stderr. `SILENT` says nothing."""

    def __init__(self, line: Callable[[str], None] | None = None):
        self.console = Console(stderr=True)
        self.line = line or (lambda text: print(text, file=sys.stderr))
        self.live = line is None and self.console.is_terminal

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Within, the function given back takes the number of things done, out of `total`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        start = last = time.monotonic()
        with Progress(*columns, console=self.console, disable=not self.live, transient=True) as bar:
            task = bar.add_task(what, total=total)

            def done(count: int) -> None:
                nonlocal last
                bar.update(task, completed=count)
                now = time.monotonic()
                if not self.live and now - last > PRINT_EVERY_S and count < total:
                    last = now
                    left = (now - start) / max(count, 1) * (total - count)
                    self.line(f"{what}: {count}/{total}, {format_duration(left)} left")

            yield done


SILENT_PROGRESS = ProgressReporter(lambda text: None)
