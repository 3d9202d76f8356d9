"""A worker process seen from its parent: start it, call it, end it, and never wait for a dead one.

Whatever happens to the worker becomes one error with one line. Reading polls, so that a worker that
was killed is noticed even where something it started still holds the pipe open.

Frames of Arrow IPC over a pipe, between an engine and its worker process.
"""

import json
import os
import select
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

MAGIC = b"SIFT"
HEADER = struct.Struct("<4sQ")  # magic, bytes of payload
META = b"siftline"


@dataclass(frozen=True)
class Frame:
    """One request or reply.

    Attributes:
        kind: What is asked or answered.
        facts: Scalars and short lists; JSON-serialisable.
        columns: Arrow arrays of one length.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, pa.Array] = field(default_factory=dict)

    def lists(self, name: str) -> list[list[int]]:
        """The column `name` of integer lists as Python lists."""
        values: list[list[int]] = self.columns[name].to_pylist()
        return values


def list_column(rows: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    """Packs n arrays of any lengths into one Arrow list column of n rows with items of `kind`.

    None becomes null.
    """
    given = [row for row in rows if row is not None]
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int64)
    flat = np.concatenate(given) if given else np.zeros(0, kind.to_pandas_dtype())
    mask = pa.array([row is None for row in rows]) if len(given) < len(rows) else None
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat, type=kind), mask=mask)


def encode(frame: Frame) -> bytes:
    """Returns the bytes of `frame`, header included.

    Raises:
        ValueError: if its columns differ in length.
    """
    meta = json.dumps({"kind": frame.kind, "facts": dict(frame.facts)})
    batch = pa.record_batch(
        list(frame.columns.values()), names=list(frame.columns)
    ).replace_schema_metadata({META: meta.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    payload = sink.getvalue()
    return HEADER.pack(MAGIC, payload.size) + payload.to_pybytes()


def decode(payload: bytes) -> Frame:
    """Reads a payload (a frame without its header).

    Raises:
        ValueError: if it is no Arrow stream of one batch with our metadata.
    """
    try:
        with pa.ipc.open_stream(payload) as reader:
            batch = reader.read_next_batch()
    except (pa.ArrowException, StopIteration) as error:
        raise ValueError(f"a frame of {len(payload)} bytes is no Arrow stream: {error}") from error
    meta = (batch.schema.metadata or {}).get(META)
    if meta is None:
        raise ValueError("a frame's schema lacks its kind: the two ends run different versions")
    head = json.loads(meta)
    return Frame(head["kind"], head["facts"], dict(zip(batch.schema.names, batch, strict=True)))


def write_frame(descriptor: int, frame: Frame) -> None:
    """Writes `frame` whole.

    Raises:
        BrokenPipeError: if nobody reads the other end any more.
    """
    rest = memoryview(encode(frame))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """Reads one frame.

    Args:
        read: Returns at least one and at most so many bytes, or none at the end of input.

    Returns:
        The frame, or None where the input ends between two frames.

    Raises:
        EOFError: if the input ends inside a frame.
        ValueError: if what arrives is not a frame.
    """
    head = _exactly(read, HEADER.size)
    if not head:
        return None
    if len(head) < HEADER.size:
        raise EOFError("the pipe ended inside a frame's header")
    magic, size = HEADER.unpack(head)
    if magic != MAGIC:
        raise ValueError(f"the pipe holds {head!r} where a frame should start")
    payload = _exactly(read, size)
    if len(payload) < size:
        raise EOFError(f"the pipe ended after {len(payload)} of a frame's {size} bytes")
    return decode(payload)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    """Up to `size` bytes, fewer only where the input ends."""
    parts = []
    while size:
        part = read(min(size, 1 << 20))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


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
