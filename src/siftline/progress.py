"""How far a step is: rows done, rate, time left, said at an interval and at the end."""

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
        self.done = 0
        self._start = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        """Adds finished units; says a line when the last one is `INTERVAL_SECONDS` old."""
        self.done += count
        now = time.monotonic()
        if now - self._said >= INTERVAL_SECONDS:
            self._said = now
            self._emit(self.line())

    def reach(self, done: int, total: int) -> None:
        """Sets the count, for callers that know how far they are."""
        self.total = total
        self.advance(done - self.done)

    def line(self) -> str:
        """Such as `likelihood 12,400/50,000 rows (24.8 %) 310 rows/s, 2:01 left`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        said = f"{self.label} {self.done:,}"
        if self.total:
            left = clock((self.total - self.done) / rate) if rate else "unknown"
            said += f"/{self.total:,} {self.unit} ({100 * self.done / self.total:.1f} %)"
            return f"{said} {_rate(rate)} {self.unit}/s, {left} left"
        return f"{said} {self.unit} {_rate(rate)} {self.unit}/s"

    def close(self) -> None:
        """Says the final count, where anything was done."""
        if self.done:
            took = clock(time.monotonic() - self._start)
            self._emit(f"{self.label} {self.done:,} {self.unit} in {took}")
