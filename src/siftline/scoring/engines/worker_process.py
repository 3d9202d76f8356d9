"""A worker process seen from its parent: start it, call it, end it, and never wait for a dead one.

Whatever happens to the worker becomes one error with one line. Reading polls, so that a worker that
was killed is noticed even where something it started still holds the pipe open.
"""

import os
import select
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from siftline.scoring.engines.pipe import Frame, read_frame, write_frame

CLOSE_SECONDS = 5.0
LOG_VARIABLE = "SIFTLINE_WORKER_LOG"


class WorkerProcess:
    """A `siftline.scoring.engines.worker` process, and calls to it.

    Its messages go to our stderr, or are appended to the file that SIFTLINE_WORKER_LOG names.

    Attributes:
        process: The process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Starts `command` with the worker's own options behind it.

        Raises:
            ValueError: if the program cannot be started.
        """
        line = [*command, "--parent", str(os.getpid())]
        if threading.current_thread() is threading.main_thread():
            line.append("--armed")  # see worker.follow_parent
        log = os.environ.get(LOG_VARIABLE)
        stderr = Path(log).expanduser().open("ab") if log else None
        try:
            self.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0
            )
        except OSError as error:
            raise ValueError(f"can't start the vllm worker with {command[0]!r}: {error}") from error
        finally:
            if stderr is not None:
                stderr.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._program = command[0]
        self._lock = threading.RLock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def call(self, request: Frame) -> Frame:
        """Sends a request and waits for its answer; one at a time, whichever thread asks.

        Raises:
            ValueError: if the worker refuses the request (it stays usable), or is closed.
            RuntimeError: if it failed or died; it is closed then.
        """
        with self._lock:
            if self._closed:
                raise ValueError("the vllm worker is closed: open a new engine")
            try:
                write_frame(self._stdin.fileno(), request)
                reply = read_frame(self._read)
            except (BrokenPipeError, EOFError) as error:
                raise RuntimeError(self._death(request.kind)) from error
            except BaseException:
                # Nobody will read the answer to a request under way: the worker is of no more use.
                self.close(wait=0)
                raise
            if reply is None:
                raise RuntimeError(self._death(request.kind))
            if reply.kind == "error" and reply.facts["fatal"]:
                self.close()
        if reply.kind == "error":
            line = reply.facts["line"]
            if reply.facts["refused"]:
                raise ValueError(line)
            raise RuntimeError(f"the vllm worker failed in {request.kind!r}: {line}")
        return reply

    def close(self, wait: float = CLOSE_SECONDS) -> None:
        """Ends the worker: by the end of its input, and after `wait` seconds by SIGKILL."""
        self._closed = True
        self._stdin.close()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with self._lock:  # a call in another thread sees the end of input first
            self._stdout.close()

    def _read(self, size: int) -> bytes:
        """Reads from the worker; the end of input is also its death with the pipe held open."""
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while True:
            dead = self.process.poll() is not None
            if poll.poll(0 if dead else 1000):
                return os.read(self._stdout.fileno(), size)
            if dead:
                return b""

    def _death(self, kind: str) -> str:
        """Closes a worker that ended in a call and says how it ended, in one line."""
        if self._closed:
            return f"the vllm worker (pid {self.process.pid}) was closed during {kind!r}"
        self.close()
        code = self.process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        where = os.environ.get(LOG_VARIABLE) or "stderr"
        if kind == "open" and code >= 0:
            advice = f"{self._program!r} needs siftline and vllm installed"
        elif -code == signal.SIGKILL:
            advice = "most often memory ran out: choose a smaller dtype, max_length or batch_tokens"
        else:
            advice = "open a new engine to go on"
        return (
            f"the vllm worker (pid {self.process.pid}) {how} during {kind!r}; {advice}; "
            f"its last words are on {where}"
        )
