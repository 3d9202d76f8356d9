"""The worker: vLLM in a process of its own, spoken to in frames over its stdin and stdout.

Run as `python -m siftline.scoring.engines.worker --parent PID`, by `worker_process` only. A process
of its own keeps vLLM's pins out of ours, and its end is the one sure way to give the card back
(vLLM has no clean shutdown in-process). It may run under another interpreter: that environment
needs siftline
(`pip install --no-deps` will do), pyarrow, numpy and vllm.

It must not outlive its parent. Three things see to that: stdin ends when the parent closes it or
dies; a thread watches the parent's pid, for when the worker is in the middle of a call or a fork of
the parent holds the pipe open; and the kernel kills it with the parent, for when vLLM's C++ holds
the interpreter's lock. The last is armed only if the parent's main thread started it, because the
kernel counts the starting *thread's* end as the parent's death.

vLLM and its libraries print to stdout. The worker therefore moves its pipe to private descriptors
at once and lets descriptor 1 mean stderr.
"""

import argparse
import ctypes
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from siftline.scoring.engines.pipe import Frame, read_frame, write_frame

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.5
LONGEST_LINE = 600
"""Characters of an error that cross the pipe; the traceback on stderr has the rest."""


class Backend(Protocol):
    """What the worker serves."""

    def facts(self) -> Mapping[str, Any]:
        """What the engine must know about it, JSON-serialisable."""
        ...

    def handle(self, request: Frame) -> Frame:
        """Answers one request.

        A ValueError refuses the request and leaves the backend usable; any other exception ends the
        worker, because what it left behind inside the engine is unknown.
        """
        ...


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, cut to a readable length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 4] + " ..."


def error_frame(error: BaseException, *, fatal: bool) -> Frame:
    """The frame that carries `error` to the parent; its traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    refused = isinstance(error, ValueError)
    line = one_line(error) if refused else f"{type(error).__name__}: {one_line(error)}"
    return Frame("error", {"refused": refused, "line": line, "fatal": fatal})


def follow_parent(parent: int, *, armed: bool) -> None:
    """Makes this process end when process `parent` does; returns at once.

    Args:
        parent: Process id of the parent.
        armed: Also ask the kernel for SIGKILL at the end of the thread that started us (Linux).
    """
    if armed and sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")

    def watch() -> None:
        # Also covers a parent that died before the line above.
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def claim_pipe() -> tuple[int, int]:
    """Moves stdin and stdout to private descriptors; from then on prints go to stderr.

    Returns:
        (descriptor to read frames from, descriptor to write frames to). Programs that the worker
        starts inherit neither.
    """
    frames_in, frames_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # unbuffered, and in order with the tracebacks
    return frames_in, frames_out


def serve(open_backend: Callable[[Mapping[str, Any]], Backend], source: int, sink: int) -> int:
    """Answers frames until the input ends. The first opens the backend with its facts.

    Returns:
        The exit status: 0 at the end of input, 1 after a failure (which has been reported).
    """
    read = functools.partial(os.read, source)
    backend: Backend | None = None
    while (request := read_frame(read)) is not None:
        try:
            if backend is None:
                backend = open_backend(request.facts)
                reply = Frame("ready", backend.facts())
            else:
                reply = backend.handle(request)
        except Exception as error:
            reply = error_frame(error, fatal=backend is None or not isinstance(error, ValueError))
        write_frame(sink, reply)
        if reply.kind == "error" and reply.facts["fatal"]:
            return 1
    return 0


def open_vllm(facts: Mapping[str, Any]) -> Backend:
    """Starts vLLM; imported here, so that a failing import is reported like any other failure."""
    from siftline.scoring.engines.vllm_backend import open_backend

    return open_backend(facts)


def main(
    arguments: Sequence[str] | None = None,
    open_backend: Callable[[Mapping[str, Any]], Backend] = open_vllm,
) -> int:
    """Runs a worker in this process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="siftline.scoring.engines.worker")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--armed", action="store_true", help="started by its main thread")
    options = parser.parse_args(arguments)
    # Ctrl-C reaches the whole group; the parent decides, and closing the pipe ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = claim_pipe()
    follow_parent(options.parent, armed=options.armed)
    try:
        return serve(open_backend, source, sink)
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit: vLLM's threads and destructors can hold an orderly exit up for good.
    os._exit(status)
