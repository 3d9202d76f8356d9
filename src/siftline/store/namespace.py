"""The files of one namespace of the store: sealed parts, open journals, leases.

    store/<scorer>-<namespace hash>/
        namespace.json                 what the hash stands for
        used                           empty; its time is when a run last looked here
        parts/b03-<content hash>.parquet       compared with its name at every reading
        journals/b03-<writer>.journal  open or orphaned journals
        leases/b03.lock                held by the process that writes the bucket

Every change leaves the records readable at any moment, to a reader that holds no lease and to the
next process after a SIGKILL: what is new is there before what is old goes, records that are there
twice meanwhile are told by their key, and only the holder of a bucket's lease changes its files.
Readers list the journals before the parts, because records move from the former to the latter, and
start over where a listing turns out to be out of date.

Append-only files of record batches: what is in one survives the process that wrote it.
"""

import errno
import fcntl
import json
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.locks import Held, take
from siftline.rows.shards import PartWriter, no_rows, sync, write_json
from siftline.rows.verified import AlteredError, conform, content_hash, named_hash, read_parquet

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


logger = logging.getLogger(__name__)

BUCKETS = 16
"""Store buckets, by the leading bits of a prompt id. Fixed, so that the batches planned inside a
bucket, and with them the last bits of a float, do not depend on how many buckets a pool has."""
MAX_PARTS = 8
"""Parts of a bucket; one more and they are merged. A run adds one, so every ninth run pays."""
STAMP_SECONDS = 60.0
"""How exactly the last use of a namespace is known."""
_FOLDERS = ("parts", "journals", "leases")
_NAMESPACE = b"siftline.store.namespace"
_ASKED = "move it away and run again; what it held is asked again"
_RENEWED = "delete it, the next run that uses the namespace writes it again"
_creating = threading.Lock()


@dataclass(frozen=True)
class Namespace:
    """What a record's value depends on besides its key.

    Attributes:
        scorer: Name of the scorer, also the folder's prefix.
        version: Version of the scorer's code; raise it when its numbers change.
        parameters: Everything else that moves the numbers. JSON.
        fingerprint: The engine's hash of weights, adapter, dtype and backend.
    """

    scorer: str
    version: int
    fingerprint: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder name under `store/`."""
        return f"{self.scorer}-{content_hash(asdict(self))[:16]}"


class InUseError(ValueError):
    """A live process holds the lease."""


class NamespaceFolder:
    """The files of one namespace, whatever its records look like.

    Args:
        path: The folder.
        namespace: What it stands for, where this process may have to make the folder.
    """

    def __init__(self, path: Path, namespace: Namespace | None = None) -> None:
        self.path, self.namespace = path, namespace

    def create(self) -> None:
        """Makes the folder; what is there stays as it is."""
        assert self.namespace is not None, f"{self.path} is gone"
        with _creating:  # threads of one process would write under one temporary name
            for name in _FOLDERS:
                (self.path / name).mkdir(parents=True, exist_ok=True)
            write_json(self.path / "namespace.json", asdict(self.namespace))

    def load(self) -> Namespace:
        """Reads what the folder stands for.

        Raises:
            AlteredError: if namespace.json is missing or damaged.
        """
        path = self.path / "namespace.json"
        try:
            found = Namespace(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise AlteredError(f"{path} is not readable ({error}): {_RENEWED}") from error
        if found.folder != self.path.name:
            raise AlteredError(f"{path} is that of {found.folder}: {_RENEWED}")
        return found

    def stamp(self) -> None:
        """Notes that the namespace is in use, at most once in `STAMP_SECONDS`."""
        path = self.path / "used"
        if not path.exists() or time.time() - path.stat().st_mtime >= STAMP_SECONDS:
            if self.namespace is not None:
                self.create()
            path.touch()

    def parts(self, bucket: int) -> list[Path]:
        """Sealed parts of a bucket."""
        return _listed(self.path / "parts", f"b{bucket:02d}-", ".parquet")

    def journals(self, bucket: int) -> list[Path]:
        """Journals of a bucket, of live and of dead writers."""
        return _listed(self.path / "journals", f"b{bucket:02d}-", ".journal")

    def tables(self, bucket: int, columns: list[str] | None = None) -> list[pa.Table]:
        """All committed records of a bucket; some may be there twice.

        Raises:
            AlteredError: if a part or a journal is not what was written, or of another namespace.
        """
        while True:
            journals = self.journals(bucket)
            try:
                open_ = [table for path in journals for table in self._journal(path).batches]
                parts = self.parts(bucket)
                sealed = [self._part(path, columns) for path in parts]
            except FileNotFoundError:
                continue
            # A folder that changes while it is listed may show neither the old file nor the new.
            if self.parts(bucket) == parts:
                return sealed + [table.select(columns) if columns else table for table in open_]

    @contextmanager
    def lease(self, bucket: int, *, wait: bool = True) -> Iterator[None]:
        """Holds a bucket for writing.

        The lock belongs to the process, so the lease of a killed one is free at once.

        Args:
            bucket: Its number.
            wait: Whether to wait while somebody else holds it.

        Raises:
            InUseError: if somebody else holds it and this is not to wait.
        """
        path = self.path / "leases" / f"b{bucket:02d}.lock"
        while True:
            if self.namespace is not None:
                self.create()  # another process may have removed the namespace meanwhile
            with path.open("a") as handle:
                try:
                    take(handle, path, str(path), wait=wait, say=logger.info)
                except Held as error:
                    raise InUseError(str(error)) from None
                if _is_at(handle.fileno(), path):
                    yield
                    return

    def held(self, bucket: int) -> bool:
        """Whether some process writes a bucket right now; takes nothing from it."""
        try:
            with (self.path / "leases" / f"b{bucket:02d}.lock").open("r") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def leftovers(self, bucket: int) -> list[Path]:
        """Temporary files of a bucket; those of dead writers, to the holder of the lease."""
        names = tuple(f"{dots}records-{bucket}-" for dots in (".", ".."))
        return [path for name in names for path in _listed(self.path / "parts", name, "")]

    def seal(self, bucket: int) -> None:
        """Turns the bucket's journals into one Parquet part; call it under the lease.

        More than `MAX_PARTS` parts are then merged into one.
        """
        for path in self.leftovers(bucket):
            path.unlink()
        journals = self.journals(bucket)
        batches: list[pa.Table] = []
        for path in journals:
            frames = self._journal(path)
            batches += frames.batches
            if frames.torn_bytes:
                logger.warning("%s: left out %d bytes of a torn batch", path, frames.torn_bytes)
        if batches:
            self._add_part(bucket, batches, journals)
        for path in journals:
            path.unlink()
        self._compact(bucket)

    def _compact(self, bucket: int) -> None:
        parts = self.parts(bucket)
        if len(parts) <= MAX_PARTS:
            return
        merged = self._add_part(bucket, [self._part(path) for path in parts], parts)
        for path in parts:
            if path.name != merged:  # the union may equal one of them
                path.unlink()

    def stamped(self, schema: pa.Schema) -> pa.Schema:
        """A schema of records that says which namespace they are of."""
        return schema.with_metadata({_NAMESPACE: self.path.name})

    def _part(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        """A sealed part; its name holds its hash, its metadata the namespace.

        Raises:
            FileNotFoundError: if it was merged into another one meanwhile.
        """
        try:
            table = read_parquet(path, named_hash(path), columns=columns, remedy=_ASKED)
        except AlteredError:
            if path.exists():
                raise
            raise FileNotFoundError(path) from None
        return self._own(table, path)

    def _journal(self, path: Path) -> Frames:
        frames = scan_journal(path)
        for table in frames.batches:
            self._own(table, path)
        return frames

    def _own(self, table: pa.Table, path: Path) -> pa.Table:
        """The table, if its records are of this namespace; earlier versions did not say."""
        named = (table.schema.metadata or {}).get(_NAMESPACE, self.path.name.encode()).decode()
        if named != self.path.name:
            raise AlteredError(f"{path} holds records of {named}, not of this namespace: {_ASKED}")
        return table

    def _add_part(self, bucket: int, tables: list[pa.Table], sources: list[Path]) -> str:
        """Writes what the sources hold as one part, as old as the newest of them."""
        written = max(path.stat().st_mtime_ns for path in sources)
        schema = self.stamped(tables[0].schema)
        frame = unique(tables, schema, self.path)
        writer = PartWriter(self.path / "parts", stem=f"b{bucket:02d}")
        writer.add("records", bucket, frame.sort("key").to_arrow().cast(schema))
        if not writer.parts:
            return ""
        os.utime(self.path / "parts" / writer.parts[0].file, ns=(written, written))
        sync(self.path / "parts")  # before what it replaces goes
        return writer.parts[0].file


def unique(tables: list[pa.Table], schema: pa.Schema, path: Path) -> pl.DataFrame:
    """Records of several tables of the namespace at `path`, one per key."""
    tables = [conform(table, schema, path, _ASKED) for table in tables]
    frame = pl.from_arrow(pa.concat_tables(tables) if tables else no_rows(schema))
    assert isinstance(frame, pl.DataFrame)
    return frame.unique("key", keep="first", maintain_order=True)


def _listed(folder: Path, start: str, end: str) -> list[Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [
        folder / name for name in sorted(names) if name.startswith(start) and name.endswith(end)
    ]


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
