"""The score and sample store: what a model once said is never asked again.

A *namespace* is one scorer with one version, one set of parameters and one engine fingerprint; its
records are keyed by a hash of exactly what the model saw (token ids and spans), never by a path or
a name. Renaming a source or moving a threshold therefore finds every score again, and a changed
weight, template or parameter never meets an old one.

A writer holds the bucket's lease and appends each planned batch to its own journal, so a killed
process loses the batch it was computing and nothing else. Closing seals the journal into a Parquet
part; journals of dead writers are sealed by the next process that gets the lease. A committed
record is never replaced.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.rows.schema import digest
from siftline.store.namespace import (
    BUCKETS,
    DiskFullError,
    Journal,
    Namespace,
    NamespaceFolder,
    unique,
)

__all__ = ["BUCKETS", "DiskFullError", "Namespace", "Store", "collect", "score_key"]


def score_key(tokens: Sequence[int], *rest: Any) -> str:
    """Key of one record: hash of the token ids and of whatever else the model is told (JSON)."""
    return digest(list(tokens), *rest)


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
        self.files = NamespaceFolder(self.folder, namespace)
        self.files.create()

    def read(self, bucket: int) -> pl.DataFrame:
        """All committed records of a bucket, one per key.

        A key lies there twice only where records are being moved, or a process died doing so, and
        then the two records are the same.
        """
        return unique(self.files.tables(bucket), self.schema, self.folder)

    def keys(self, bucket: int) -> set[str]:
        """Keys of the committed records of a bucket."""
        tables = self.files.tables(bucket, ["key"])
        return {key for table in tables for key in table.column("key").to_pylist()}

    def lease(self, bucket: int) -> AbstractContextManager[None]:
        """Holds a bucket for writing; waits while another process holds it."""
        return self.files.lease(bucket)

    @contextmanager
    def writer(self, bucket: int) -> Iterator[Callable[[pa.Table], None]]:
        """Yields `append(batch)` under the bucket's lease, and seals the journal at the end.

        Orphaned journals of the bucket are sealed first. When the body raises, what was appended
        stays in the journal, readable, and the next writer seals it.
        """
        with self.lease(bucket):
            self.seal(bucket)
            name = f"b{bucket:02d}-{os.getpid()}-{time.time_ns()}.journal"
            journal = Journal(self.folder / "journals" / name, self.files.stamped(self.schema))
            try:
                yield journal.append
            finally:
                journal.close()
            self.seal(bucket)

    def seal(self, bucket: int) -> None:
        """Turns the bucket's journals into one Parquet part; call it under the lease."""
        self.files.seal(bucket)


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
    wanted = list(set(keys))
    store.files.stamp()
    records = store.read(bucket).filter(pl.col("key").is_in(wanted))
    if records.height == len(wanted):
        progress(len(keys))
        return Collected(records, 0, len(keys), {})
    failed: dict[str, str] = {}
    computed = 0
    with store.writer(bucket) as append:
        have = store.keys(bucket)  # another process may have filled it while this one waited
        found = sum(key in have for key in keys)
        for batch in batches:
            missing = list({keys[i]: i for i in reversed(batch) if keys[i] not in have}.values())
            if missing:
                table, reasons = compute(sorted(missing))
                append(table)
                failed |= reasons
                computed += table.num_rows
                have |= {keys[i] for i in missing}
            progress(len(batch))
        # Before the lease goes, and with it what keeps the namespace from being collected.
        records = store.read(bucket).filter(pl.col("key").is_in(wanted))
    return Collected(records, computed, found, failed)
