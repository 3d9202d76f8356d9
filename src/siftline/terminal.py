"""A progress bar for people; where nobody watches, the lines of `progress`.

rich is imported when a bar is drawn: most commands need none.
"""

import threading
from collections.abc import Callable
from typing import TextIO

from siftline.progress import Count, Progress, Tracker


class Bar:
    """A bar on a terminal with rows, rates and time left.

    Args:
        label: Name of the step.
        total: Units to do; 0 where it isn't known.
        unit: What is counted.
        stream: The terminal.
        emit: Takes the line at the end.
    """

    def __init__(
        self, label: str, total: int, unit: str, stream: TextIO, emit: Callable[[str], None]
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Drawn

        self.count, self._emit, self._lock = Count(label, total, unit), emit, threading.Lock()
        self._drawn = Drawn(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._drawn.add_task(label, total=total or None, figures="")
        self._drawn.start()

    def advance(self, count: int, tokens: int = 0) -> None:
        """Adds finished units and the tokens a model ran for them, from any thread."""
        with self._lock:
            self.count.add(count, tokens)
            self._drawn.update(
                self._task,
                completed=self.count.done,
                total=self.count.total or None,
                figures=self.count.figures(),
            )

    def reach(self, done: int, total: int) -> None:
        """Sets the count, for callers that know how far they are."""
        self.count.total = total
        self.advance(done - self.count.done)

    def close(self) -> None:
        """Takes the bar away and leaves one line, where anything was done."""
        self._drawn.stop()
        if self.count.done:
            self._emit(self.count.summary())


def tracker(
    label: str, total: int, unit: str, stream: TextIO, emit: Callable[[str], None]
) -> Tracker:
    """A bar where the stream is a terminal, else lines at an interval."""
    if stream.isatty():
        return Bar(label, total, unit, stream, emit)
    return Progress(label, total, emit, unit)
