"""Append-only files of record batches: what is in one survives the process that wrote it.

A batch is one checksummed frame, there whole or not at all. Bytes handed to the kernel survive a
killed process; an fsync at least every `SYNC_SECONDS` bounds what a power cut takes.

A killed writer leaves a frame that ends too soon, and a power cut may leave zeros: such an end is
left out. A frame that is all there and does not fit its checksums was altered, and is an error. The
header has a checksum of its own, so that an altered length is not taken for a torn frame.
"""

import errno
import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from siftline.rows.verified import AlteredError

SYNC_SECONDS = 5.0
_HEADER = struct.Struct("<4sIII")  # magic, payload bytes, their crc32, crc32 of these three
_CHECKED = struct.Struct("<4sII")
_MAGIC, _FIRST_MAGIC = b"SJ02", b"SJ01"
"""SJ01, of earlier versions, has no checksum of its header: whatever does not fit ends the file."""


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
            head = _CHECKED.pack(_MAGIC, len(payload), zlib.crc32(payload))
            self._write(head + zlib.crc32(head).to_bytes(4, "little") + payload)
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
    """Reads a journal up to where its writer was stopped.

    Raises:
        AlteredError: if a frame is all there and was altered.
    """
    raw = memoryview(path.read_bytes())
    batches, at = [], 0
    while at < len(raw):
        frame = _frame(raw[at:])
        if frame is None:
            raise AlteredError(
                f"{path} was altered behind byte {at:,} of {len(raw):,}: `truncate -s {at} FILE` "
                "keeps what stands before, and what it loses is asked again"
            )
        size, payload = frame
        if payload is None:
            break
        batches.append(pa.ipc.open_stream(payload).read_all())
        at += size
    return Frames(batches, len(raw) - at)


def _frame(rest: memoryview) -> tuple[int, memoryview | None] | None:
    """Size and payload of the first frame; no payload where it is torn, None where altered."""
    torn = len(rest), None
    if len(rest) < _HEADER.size:
        return torn
    magic, size, crc, own = _HEADER.unpack_from(rest)
    if magic == _FIRST_MAGIC:
        payload = rest[_CHECKED.size : _CHECKED.size + size]
        whole = len(payload) == size and zlib.crc32(payload) == crc
        return (_CHECKED.size + size, payload) if whole else torn
    if zlib.crc32(rest[: _CHECKED.size]) != own or magic != _MAGIC:
        return None if any(rest) else torn
    payload = rest[_HEADER.size : _HEADER.size + size]
    if len(payload) < size:
        return torn
    if zlib.crc32(payload) != crc:
        return None if any(payload) else torn
    return _HEADER.size + size, payload


def read_journal(path: Path) -> list[pa.Table]:
    """Reads the committed batches of a journal; see `scan_journal`."""
    return scan_journal(path).batches
