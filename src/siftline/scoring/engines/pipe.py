"""Frames of Arrow IPC over a pipe, between an engine and its worker process.

A frame is a kind, JSON facts, and columns of equal length: token ids and scores travel as Arrow
buffers, not as Python objects, so a planned batch costs a copy and no pickle is ever read. On the
wire it is a magic word, the payload's length, and one Arrow stream whose schema metadata carries
kind and facts. The magic word tells something printed into the pipe by mistake from a frame.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
