"""Equality of mathematical expressions by math-verify, in a process that may be killed.

math-verify limits its own time with SIGALRM, which works only on the main thread and only between
Python instructions: a huge power inside SymPy never returns. So the comparison runs in a child
process that arms its own alarm with the default action. The kernel then ends the child whatever it
is doing, on any thread of the caller, and a child whose parent is gone reads end of file and ends.

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
from typing import IO

MEMORY = 4 << 30  # bytes of address space for the child: an exploding expression, not the machine


class EquivalenceError(RuntimeError):
    """The comparison did not finish; the message says why."""


class Equivalence:
    """Compares expressions in one long-lived child process, started when first needed.

    Safe to call from several threads; calls run one after another.

    Attributes:
        timeout: Seconds one comparison may take.
        command: What the interpreter of the child is told to run.
    """

    command: tuple[str, ...] = ("-m", "siftline.scoring.equivalence")

    def __init__(self, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0

    def __call__(self, gold: str, target: str) -> bool:
        """Whether two LaTeX expressions are equal; unparsable ones are not.

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
        return bool(reply["equal"])

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
        if code == -signal.SIGALRM:
            return f"timeout after {self.timeout:g} s"
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


def equal(gold: str, target: str) -> bool:
    """Compares two expressions with math-verify, here and without a limit on time.

    Raises:
        Exception: whatever SymPy raises; `serve` reports it.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    parsed = [
        parse(
            f"${text.replace('$', '')}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
        for text in (gold, target)
    ]
    if not all(parsed):
        return False
    return bool(verify(*parsed, timeout_seconds=None, raise_on_error=True))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answers one JSON line `[seconds, gold, target]` with one JSON line, until end of file."""
    import logging

    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off; ours are on
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal("1", "1")  # imports SymPy outside the first request's time
    for line in requests:
        seconds, gold, target = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply: dict[str, object] = {"equal": equal(gold, target)}
        except (Exception, MemoryError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # Neither an ignored nor a blocked alarm may be inherited from the parent.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end we read
    serve(sys.stdin, sys.stdout)
