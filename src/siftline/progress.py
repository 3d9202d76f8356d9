"""How far a step is: rows done, rate, time left, said at an interval and at the end.

Lines suit logs and Dagster; there is a bar for people. Both are a `Tracker`, so the code that
counts doesn't know which of them it talks to.

A progress bar for people; where nobody watches, the lines of `progress`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TextIO

INTERVAL_SECONDS = 5.0
WINDOW_SECONDS = 60.0
"""Rates are those of the last minute: rows found in the store come in a rush and then no more."""


class Tracker(Protocol):
    """Is told how far a step is."""

    def advance(self, count: int, tokens: int = 0) -> None:
        """Adds finished units and the tokens a model ran for them, from any thread."""
        ...

    def reach(self, done: int, total: int) -> None:
        """Sets the count, for callers that know how far they are."""
        ...

    def close(self) -> None:
        """Says the final count."""
        ...


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class Count:
    """Units and tokens done, and how fast.

    Args:
        label: Name of the step.
        total: Units to do; 0 where it isn't known.
        unit: What is counted.
        now: Reads a clock, in seconds.
    """

    def __init__(
        self, label: str, total: int, unit: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.label, self.total, self.unit, self._now = label, total, unit, now
        self.done = self.tokens = 0
        self._start = now()
        self._past = deque([(self._start, 0, 0)])  # when, units and tokens then; rising

    def add(self, count: int, tokens: int) -> None:
        """Adds finished units and tokens."""
        self.done += count
        self.tokens += tokens
        now = self._now()
        self._past.append((now, self.done, self.tokens))
        while len(self._past) > 2 and self._past[1][0] <= now - WINDOW_SECONDS:
            self._past.popleft()

    def rates(self) -> tuple[float, float]:
        """Units and tokens a second."""
        when, done, tokens = self._past[0]
        seconds = max(self._now() - when, 1e-9)
        return (self.done - done) / seconds, (self.tokens - tokens) / seconds

    def line(self) -> str:
        """Such as `likelihood 400/500 rows (80.0 %) 31 rows/s, 9,120 tokens/s, 0:03 left`."""
        return f"{self.label} {self.figures()}"

    def figures(self) -> str:
        """The line without the label."""
        rate, tokens = self.rates()
        rates = f"{_rate(rate)} {self.unit}/s"
        if self.tokens:
            rates += f", {_rate(tokens)} tokens/s"
        if not self.total:
            return f"{self.done:,} {self.unit} {rates}"
        left = clock(max(0, self.total - self.done) / rate) if rate else "unknown"
        share = 100 * self.done / self.total
        return f"{self.done:,}/{self.total:,} {self.unit} ({share:.1f} %) {rates}, {left} left"

    def summary(self) -> str:
        """The whole step, such as `likelihood 500 rows in 0:16, 9,120 tokens, 570 a second`."""
        seconds = max(self._now() - self._start, 1e-9)
        said = f"{self.label} {self.done:,} {self.unit} in {clock(seconds)}"
        if self.tokens:
            said += f", {self.tokens:,} tokens, {_rate(self.tokens / seconds)} a second"
        return said


class Progress:
    """Counts units of one step and says so in lines.

    Args:
        label: Name of the step.
        total: Units to do; 0 where it isn't known.
        emit: Takes one line.
        unit: What is counted.
    """

    def __init__(
        self, label: str, total: int, emit: Callable[[str], None], unit: str = "rows"
    ) -> None:
        self.count, self._emit = Count(label, total, unit), emit
        self._lock = threading.Lock()
        self._said = time.monotonic()

    def advance(self, count: int, tokens: int = 0) -> None:
        """Adds finished units, from any thread; says a line at an interval.

        Args:
            count: Units finished, whether computed or found.
            tokens: Tokens a model ran for them.
        """
        with self._lock:
            self.count.add(count, tokens)
            now = time.monotonic()
            if now - self._said >= INTERVAL_SECONDS:
                self._said = now
                self._emit(self.count.line())

    def reach(self, done: int, total: int) -> None:
        """Sets the count, for callers that know how far they are."""
        self.count.total = total
        self.advance(done - self.count.done)

    def close(self) -> None:
        """Says the final count, where anything was done."""
        if self.count.done:
            self._emit(self.count.summary())


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
