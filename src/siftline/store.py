"""The score and sample store: what a model once said is never asked again.

A *namespace* is one scorer with one version, one set of parameters and one engine fingerprint; its
records are keyed by a hash of exactly what the model saw (token ids and spans), never by a path or
a name. Renaming a source or moving a threshold therefore finds every score again, and a changed
weight, template or parameter never meets an old one.

    store/<scorer>-<namespace hash>/
        namespace.json                 what the hash stands for
        parts/b03-<content hash>.parquet
        journals/b03-<writer>.journal  open or orphaned journals
        leases/b03.lock                held by the process that writes the bucket

A writer appends each planned batch to its own journal as one checksummed frame, so a killed process
loses the batch it was computing and nothing else: bytes handed to the kernel survive the process,
and an fsync at least every `SYNC_SECONDS` bounds what a power cut takes. Closing seals the journal
into a Parquet part. Journals of dead writers are sealed by the next process that gets the lease. A
committed record is never replaced.
"""

import errno
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa

from siftline.schema import digest
from siftline.shards import PartWriter, content_hash, read_parquet, write_json

BUCKETS = 16
"""Store buckets, by the leading bits of a prompt id. Fixed, so that the batches planned inside a
bucket, and with them the last bits of a float, do not depend on how many buckets a pool has."""

SYNC_SECONDS = 5.0
_HEADER = struct.Struct("<4sII")  # magic, payload bytes, crc32
_MAGIC = b"SJ01"


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


def score_key(tokens: Sequence[int], *rest: Any) -> str:
    """Key of one record: hash of the token ids and of whatever else the model is told (JSON)."""
    return digest(list(tokens), *rest)


class DiskFullError(OSError):
    """The disk filled up while committing; everything committed before is readable."""


class Journal:
    """Appends batches of one bucket; one frame a batch, whole or not at all."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = path.open("ab")
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
            self._handle.write(_HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload)
            self._handle.flush()
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            os.ftruncate(self._handle.fileno(), start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    error.errno, f"no space left for {self.path}: free some and run again"
                ) from error
            raise

    def _sync(self) -> None:
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flushes the journal to disk and closes it."""
        try:
            self._sync()
        finally:
            self._handle.close()


def read_journal(path: Path) -> list[pa.Table]:
    """Reads the committed batches of a journal; a torn last frame is left out."""
    raw = path.read_bytes()
    batches, at = [], 0
    while at + _HEADER.size <= len(raw):
        magic, size, crc = _HEADER.unpack_from(raw, at)
        payload = raw[at + _HEADER.size : at + _HEADER.size + size]
        if magic != _MAGIC or len(payload) < size or zlib.crc32(payload) != crc:
            break
        batches.append(pa.ipc.open_stream(payload).read_all())
        at += _HEADER.size + size
    return batches


class Store:
    """Records of one namespace.

    Args:
        root: The store's folder (`ROOT/store`).
        namespace: Scorer, version, parameters and engine fingerprint.
        schema: Columns of a record; the first is `key`, a string.
    """

    def __init__(self, root: Path, namespace: Namespace, schema: pa.Schema) -> None:
        assert schema.names[0] == "key", schema.names
        self.folder = root / namespace.folder
        self.schema = schema
        for name in ("parts", "journals", "leases"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "namespace.json", asdict(namespace))

    def read(self, bucket: int) -> pl.DataFrame:
        """All committed records of a bucket, one per key.

        A key occurs twice only where a process died between sealing a journal and deleting it, and
        then the two records are the same.
        """
        parts = sorted((self.folder / "parts").glob(f"b{bucket:02d}-*.parquet"))
        tables = [read_parquet(path) for path in parts]
        for path in sorted((self.folder / "journals").glob(f"b{bucket:02d}-*.journal")):
            tables += read_journal(path)
        tables = [table.cast(self.schema) for table in tables]
        frame = pl.from_arrow(pa.concat_tables(tables) if tables else self.schema.empty_table())
        assert isinstance(frame, pl.DataFrame)
        return frame.unique("key", keep="first", maintain_order=True)

    def keys(self, bucket: int) -> set[str]:
        """Keys of the committed records of a bucket."""
        return set(self.read(bucket)["key"].to_list())

    @contextmanager
    def lease(self, bucket: int) -> Iterator[None]:
        """Holds a bucket for writing; waits while another process holds it.

        The lock belongs to the process, so the lease of a killed one is free at once.
        """
        with (self.folder / "leases" / f"b{bucket:02d}.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writer(self, bucket: int) -> Iterator[Callable[[pa.Table], None]]:
        """Yields `append(batch)` under the bucket's lease, and seals the journal at the end.

        Orphaned journals of the bucket are sealed first. When the body raises, what was appended
        stays in the journal, readable, and the next writer seals it.
        """
        with self.lease(bucket):
            self.seal(bucket)
            name = f"b{bucket:02d}-{os.getpid()}-{time.time_ns()}.journal"
            journal = Journal(self.folder / "journals" / name, self.schema)
            try:
                yield journal.append
            finally:
                journal.close()
            self.seal(bucket)

    def seal(self, bucket: int) -> None:
        """Turns the bucket's journals into one Parquet part; call it under the lease."""
        journals = sorted((self.folder / "journals").glob(f"b{bucket:02d}-*.journal"))
        batches = [table for path in journals for table in read_journal(path)]
        if batches:
            frame = pl.from_arrow(pa.concat_tables(batches).cast(self.schema))
            assert isinstance(frame, pl.DataFrame)
            part = frame.unique("key", keep="first", maintain_order=True).sort("key").to_arrow()
            writer = PartWriter(self.folder / "parts", stem=f"b{bucket:02d}")
            writer.add("records", bucket, part.cast(self.schema))
        for path in journals:
            path.unlink()


Request = TypeVar("Request")


@dataclass(frozen=True)
class Collected:
    """What `collect` did in one bucket.

    Attributes:
        records: Records of all requests, one per key.
        computed: Requests the model was asked for in this run.
        found: Requests that were in the store before.
        failed: Key and reason of requests the model gave no answer for; tried again next run.
    """

    records: pl.DataFrame
    computed: int
    found: int
    failed: dict[str, str]


def collect(
    store: Store,
    bucket: int,
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    compute: Callable[[list[int]], tuple[pa.Table, dict[str, str]]],
    progress: Callable[[int], None] = lambda rows: None,
) -> Collected:
    """Computes the missing records of a bucket, batch by batch, and returns all of them.

    Batches are planned by the caller over *all* requests, before it is known which are missing, and
    every batch is committed whole. A resumed run therefore repeats the same forward passes on the
    same batches and gets the same bits; where rows were added, a batch computes only its new ones.

    Args:
        store: The namespace to fill.
        bucket: The bucket of all requests.
        keys: One key per request; repeated keys are computed once.
        batches: Positions into `keys`, every position once.
        compute: Takes positions and returns their records (columns of the store) and, by key, the
            reasons of those it could not compute.
        progress: Called with the number of requests done.

    Returns:
        The records and what it took to get them.
    """
    have = store.keys(bucket)
    found = sum(key in have for key in keys)
    failed: dict[str, str] = {}
    computed = 0
    if found < len(keys):
        with store.writer(bucket) as append:
            have = store.keys(bucket)  # another process may have filled it while this one waited
            for batch in batches:
                missing = list(
                    {keys[i]: i for i in reversed(batch) if keys[i] not in have}.values()
                )
                if missing:
                    table, reasons = compute(sorted(missing))
                    append(table)
                    failed |= reasons
                    computed += table.num_rows
                    have |= {keys[i] for i in missing}
                progress(len(batch))
    else:
        progress(len(keys))
    records = store.read(bucket).filter(pl.col("key").is_in(list(set(keys))))
    return Collected(records, computed, found, failed)
