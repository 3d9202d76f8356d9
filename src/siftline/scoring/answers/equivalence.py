"""Equality of mathematical expressions in a process that may be killed.

math-verify limits its own time with SIGALRM, which works only on the main thread and only between
Python instructions: a huge power inside SymPy never returns. So the comparison runs in a child
process that arms a timer of its own with the default action. The kernel then ends the child
whatever it is doing, on any thread of the caller, and a child whose parent is gone reads end of
file and ends.

The timer counts processor time, so that a busy machine changes no verdict; one of the clock stands
behind it, for a child that waits.

Only math-verify's LaTeX reader is used (a grammar). Its plain-expression reader calls SymPy's
`parse_expr`, which is Python's `eval`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

MEMORY = 4 << 30  # bytes of address space for the child: an exploding expression, not the machine
PATIENCE = 20
"""Seconds of the clock that a child may take for each second of processor time."""


class EquivalenceError(RuntimeError):
    """The comparison did not finish; the message says why."""


class Equivalence:
    """Compares expressions in one long-lived child process, started when first needed.

    Safe to call from several threads; calls run one after another.

    Attributes:
        timeout: Seconds of processor time that one comparison may take.
        command: What the interpreter of the child is told to run.
    """

    command: tuple[str, ...] = ("-m", "siftline.scoring.answers.equivalence")

    def __init__(self, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0

    def __call__(self, gold: str, target: str) -> bool | None:
        """Whether two expressions are equal; None where nobody can tell, as of unreadable ones.

        Raises:
            EquivalenceError: when the comparison timed out, ran out of memory or failed.
        """
        with self._lock:
            child = self._start()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps([self.timeout, gold, target]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise EquivalenceError(self._reap(child))
        reply = json.loads(line)
        if "error" in reply:
            raise EquivalenceError(reply["error"])
        equal = reply["equal"]
        return None if equal is None else bool(equal)

    def _start(self) -> "subprocess.Popen[str]":
        # After a fork the pipes belong to the parent too: a new process takes a child of its own.
        if self._child is None or self._owner != os.getpid():
            self._child = subprocess.Popen(
                [sys.executable, "-P", *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            self._owner = os.getpid()
        return self._child

    def _reap(self, child: "subprocess.Popen[str]") -> str:
        code = child.wait()
        self._discard(child)
        if code == -signal.SIGPROF:
            return f"timeout after {self.timeout:g} s"
        if code == -signal.SIGALRM:
            return f"no reply after {PATIENCE * self.timeout:g} s of the clock"
        return f"comparison process ended with code {code}"

    def _discard(self, child: "subprocess.Popen[str]") -> None:
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # closing flushes what a dead child never read
                continue
        self._child = None

    def close(self) -> None:
        """Ends the child process, if there is one."""
        with self._lock:
            child = self._child
            if child is not None and self._owner == os.getpid():
                self._discard(child)
                child.wait()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends this process if what stands inside takes more processor time; see `prepare`."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def prepare() -> None:
    """Makes this process one that its timers end, and that ends with its parent."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        # Neither an ignored nor a blocked signal may be inherited from the parent.
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end we read


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answers one JSON line `[seconds, gold, target]` with one JSON line, until end of file."""
    from siftline.scoring.answers.value_equality import compare  # SymPy, which only the child needs
    from siftline.scoring.answers.values import Unreadable

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compare("1", "1")  # what SymPy does once is outside the first request's time
    for line in requests:
        seconds, gold, target = json.loads(line)
        with limited(seconds):
            try:
                reply: dict[str, object] = {"equal": compare(gold, target)}
            except Unreadable:
                reply = {"equal": None}
            except (Exception, MemoryError) as error:
                reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    prepare()
    serve(sys.stdin, sys.stdout)
