"""A verifier of the user's own, in a process that is killed when it hangs.

Nothing is known of such a function: it may loop, wait for a server, leak, or crash in a library. It
runs in a child process, one call after another, and the parent waits for each call only so long. A
call that raises, returns no verdict, takes too long or ends the child is a `verifier_error`; the
next call gets a new child.
"""

import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, cast

from siftline.scoring.verifiers.verdict import Verdict, Verifier

TIMEOUT = 60.0
"""Seconds a call may take, the import of its module in a new child included."""


def imported(name: str) -> Verifier:
    """The verifier at an import path `package.module:attribute`; a class is called for one.

    Raises:
        ValueError: if it can't be imported or is not callable.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r} can't be imported: {error}") from error
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise ValueError(f"verifier {name!r} is not callable: give a function (response, answer)")
    return cast(Verifier, made)


class OwnVerifier:
    """Calls a verifier by import path in a child process. Safe to call from several threads.

    Attributes:
        name: `package.module:attribute`.
        timeout: Seconds a call may take.
    """

    def __init__(self, name: str, timeout: float = TIMEOUT) -> None:
        """Imports it once here, so that a name that can't be used is refused at once.

        Raises:
            ValueError: as `imported`.
        """
        imported(name)
        self.name, self.timeout = name, timeout
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __call__(self, response: str, answer: str) -> Verdict:
        """What the verifier says of `response` against `answer`; never raises on what they hold."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps([response, answer]).encode() + b"\n")
                child.stdin.flush()
                line = self._line(child)
            except BrokenPipeError:
                line = b""
            if not line.endswith(b"\n"):
                return Verdict(None, None, f"verifier_error: {self._ended(child, line)}")
        said = json.loads(line)
        if "error" in said:
            return Verdict(None, None, f"verifier_error: {said['error']}")
        return Verdict(**said)

    def close(self) -> None:
        """Ends the child process, if there is one."""
        with self._lock:
            if self._child is not None and self._owner == os.getpid():
                self._discard(self._child)

    def _started(self) -> "subprocess.Popen[bytes]":
        # After a fork the pipes belong to the parent too: a new process takes a child of its own.
        if self._child is None or self._owner != os.getpid():
            path = os.pathsep.join(p for p in sys.path if p)
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", f"import {__name__} as own; own.serve()", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
            self._owner = os.getpid()
        return self._child

    def _line(self, child: "subprocess.Popen[bytes]") -> bytes:
        """The next line of the child; cut where it ended, without its end where time ran out."""
        assert child.stdout is not None
        line = b""
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not ready.select(left):
                    return line + b"?"  # time ran out
                some = os.read(child.stdout.fileno(), 1 << 16)
                if not some:
                    return b""
                line += some
        return line

    def _ended(self, child: "subprocess.Popen[bytes]", line: bytes) -> str:
        self._discard(child)
        if line:
            return f"timeout after {self.timeout:g} s"
        return f"the verifier's process ended with code {child.returncode}"

    def _discard(self, child: "subprocess.Popen[bytes]") -> None:
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        child.wait()
        self._child = None


def _said(verify: Verifier, response: str, answer: str) -> dict[str, Any]:
    try:
        found = verify(response, answer)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    if not isinstance(found, Verdict):
        return {"error": f"it returned {type(found).__name__}, not a Verdict"}
    fault = _fault(found)
    if fault:
        return {"error": fault}
    said = asdict(found)
    # NumPy's bool and int are none to JSON; 1 for True is none to `is True`.
    said["correct"] = None if found.correct is None else bool(found.correct)
    said["first_error"] = None if found.first_error is None else int(found.first_error)
    return said


def _short(value: object) -> str:
    return repr(value)[:50]


def _fault(found: Verdict) -> str | None:
    """Why a verdict can't be taken: `correct` is no truth value, or a text is none."""
    if found.correct is not None and type(found.correct).__name__ not in ("bool", "bool_"):
        return f"correct is {_short(found.correct)}: give True, False or None"
    for name in ("extracted", "last_right"):
        value = getattr(found, name)
        if value is not None and not isinstance(value, str):
            return f"{name} is {_short(value)}: give a text or None"
    if not isinstance(found.reason, str):
        return f"reason is {_short(found.reason)}: give a text"
    if found.first_error is not None and not hasattr(found.first_error, "__index__"):
        return f"first_error is {_short(found.first_error)}: give a whole number or None"
    return None


def serve() -> None:
    """Answers JSON lines `[response, answer]` with the verdict of the verifier in sys.argv."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the verifier prints is no reply
    verify = imported(sys.argv[1])
    for line in sys.stdin:
        response, answer = json.loads(line)
        replies.write(json.dumps(_said(verify, response, answer)) + "\n")
        replies.flush()
