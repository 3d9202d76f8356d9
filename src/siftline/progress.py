"""How far a step is: rows done, rate, time left, said at an interval and at the end."""

import threading
import time
from collections.abc import Callable

INTERVAL_SECONDS = 5.0


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class Progress:
    """Counts units of one step and says so through `emit`.

    Args:
        label: Name of the step.
        total: Units to do; 0 where it isn't known.
        emit: Takes one line.
        unit: What is counted.
    """

    def __init__(
        self, label: str, total: int, emit: Callable[[str], None], unit: str = "rows"
    ) -> None:
        self.label, self.total, self.unit, self._emit = label, total, unit, emit
        self.done = self.tokens = 0
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()

    def advance(self, count: int, tokens: int = 0) -> None:
        """Adds finished units, from any thread; says a line at an interval.

        Args:
            count: Units finished, whether computed or found.
            tokens: Tokens a model ran for them.
        """
        with self._lock:
            self.done += count
            self.tokens += tokens
            now = time.monotonic()
            if now - self._said >= INTERVAL_SECONDS:
                self._said = now
                self._emit(self.line())

    def reach(self, done: int, total: int) -> None:
        """Sets the count, for callers that know how far they are."""
        self.total = total
        self.advance(done - self.done)

    def line(self) -> str:
        """Such as `likelihood 400/500 rows (80.0 %) 31 rows/s, 9,120 tokens/s, 0:03 left`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        said = f"{self.label} {self.done:,}"
        rates = f"{_rate(rate)} {self.unit}/s"
        if self.tokens:
            rates += f", {_rate(self.tokens / seconds)} tokens/s"
        if self.total:
            left = clock((self.total - self.done) / rate) if rate else "unknown"
            said += f"/{self.total:,} {self.unit} ({100 * self.done / self.total:.1f} %)"
            return f"{said} {rates}, {left} left"
        return f"{said} {self.unit} {rates}"

    def close(self) -> None:
        """Says the final count, where anything was done."""
        if self.done:
            seconds = time.monotonic() - self._start
            said = f"{self.label} {self.done:,} {self.unit} in {clock(seconds)}"
            if self.tokens:
                said += (
                    f", {self.tokens:,} tokens, {_rate(self.tokens / max(seconds, 1e-9))} a second"
                )
            self._emit(said)
