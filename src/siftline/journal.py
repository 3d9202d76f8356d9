"""Append-only files of record batches: what is in one survives the process that wrote it.

A batch is one checksummed frame, there whole or not at all. Bytes handed to the kernel survive a
killed process; an fsync at least every `SYNC_SECONDS` bounds what a power cut takes.
"""

import errno
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

SYNC_SECONDS = 5.0
_HEADER = struct.Struct("<4sII")  # magic, payload bytes, crc32
_MAGIC = b"SJ01"


class DiskFullError(OSError):
    """The disk filled up while committing; everything committed before is readable."""


class Journal:
    """Appends batches of one bucket; one frame a batch, whole or not at all."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: nothing of a frame that didn't fit may be written later.
        self._handle = path.open("ab", buffering=0)
        self._synced = time.monotonic()

    def append(self, batch: pa.Table) -> None:
        """Commits one batch.

        Raises:
            DiskFullError: if it does not fit; the journal ends after the previous batch.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as stream:
            stream.write_table(batch.select(self.schema.names).cast(self.schema))
        payload = sink.getvalue().to_pybytes()
        start = self._handle.tell()
        try:
            self._write(_HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            os.ftruncate(self._handle.fileno(), start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    error.errno, f"no space left for {self.path}: free some and run again"
                ) from error
            raise

    def _write(self, frame: bytes) -> None:
        left = memoryview(frame)
        while left:  # the kernel may take less than all of it
            left = left[self._handle.write(left) :]

    def _sync(self) -> None:
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flushes the journal to disk and closes it."""
        try:
            self._sync()
        finally:
            self._handle.close()


@dataclass(frozen=True)
class Frames:
    """What a journal holds: its whole batches, and bytes behind them that make none."""

    batches: list[pa.Table]
    torn_bytes: int


def scan_journal(path: Path) -> Frames:
    """Reads a journal up to the first frame that is not whole."""
    raw = path.read_bytes()
    batches, at = [], 0
    while at + _HEADER.size <= len(raw):
        magic, size, crc = _HEADER.unpack_from(raw, at)
        payload = raw[at + _HEADER.size : at + _HEADER.size + size]
        if magic != _MAGIC or len(payload) < size or zlib.crc32(payload) != crc:
            break
        batches.append(pa.ipc.open_stream(payload).read_all())
        at += _HEADER.size + size
    return Frames(batches, len(raw) - at)


def read_journal(path: Path) -> list[pa.Table]:
    """Reads the committed batches of a journal; a torn last frame is left out."""
    return scan_journal(path).batches
