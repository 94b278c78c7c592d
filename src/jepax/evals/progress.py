"""Progress of an evaluation on stderr: a message when something begins, and a bar with the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console

from jepax.io.logger import PRINT_EVERY_S, format_duration


class Progress:
    """Shows messages and bars on stderr. `SILENT` shows neither."""

    def __init__(self, log: Callable[[str], None] | None = None):
        self.console = Console(stderr=True)
        self.log = log or (lambda text: print(text, file=sys.stderr))
        self.is_live = log is None and self.console.is_terminal

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes the number of finished items out of `total`.

        Without a terminal it logs a message every `PRINT_EVERY_S` seconds instead of a bar. The time left counts
        from the first call on: before it a program is compiled.
        """
        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        first, last = None, time.monotonic()
        with rich_progress.Progress(*columns, console=self.console, disable=not self.is_live, transient=True) as bar:
            task = bar.add_task(description, total=total)

            def update(count: int) -> None:
                nonlocal first, last
                bar.update(task, completed=count)
                now = time.monotonic()
                if first is None:
                    first = now, count
                elif not self.is_live and now - last > PRINT_EVERY_S and first[1] < count < total:
                    last = now
                    left = (now - first[0]) / (count - first[1]) * (total - count)
                    self.log(f"{description}: {count}/{total}, {format_duration(left)} left")

            yield update


SILENT = Progress(lambda text: None)
