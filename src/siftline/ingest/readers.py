"""Reads sources into batches of rows, provenance and quarantine: the front door of ingestion.

    for batch in read_sources([Source("data/*.jsonl"), Source("more.parquet", source="more")]):
        batch.rows, batch.provenance, batch.quarantine

Every input row ends in exactly one place: it became a row, with a provenance line, or it went to
quarantine with file, line, reason and excerpt. (A pair is two rows, or one and one, or two faults.)
A row whose response is labelled a bad one says so; what is not read is counted by name.
Identical rows are not collapsed here; the pool does that, when it sees them all.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa

from siftline.ingest.files import InputFile, fingerprint, input_files, source_files
from siftline.ingest.layouts import Converted, Plan, convert, plan_for
from siftline.ingest.records import BINARY, Fault, Record, excerpt, read_records
from siftline.ingest.source import Holds, Source
from siftline.rows import schema

__all__ = ["Batch", "Source", "fingerprint", "read_sources", "source_files"]

_PEEK = 200
"""Records whose columns decide a file's layout."""
_BATCH_CHARS = 64 << 20
"""Characters of content that close a batch early, so long conversations don't fill the memory."""


@dataclass(frozen=True)
class Batch:
    """What a stretch of input became.

    Attributes:
        rows: `schema.ROW`, one line per input row (two per pair), copies 1.
        provenance: `schema.PROVENANCE`, one line per row, in the same order.
        quarantine: `schema.QUARANTINE`, one line per input row (half, for pairs) that is no row.
        rejected: For each row, whether its response is labelled a bad one.
        aside: How many records said something in a column (or `column[].key`) that was not read.
        repeated: Keys that stood in an object twice; the last counts.
    """

    rows: pa.Table
    provenance: pa.Table
    quarantine: pa.Table
    rejected: list[bool] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    repeated: int = 0


def read_sources(
    sources: Sequence[Source], *, batch_rows: int = 10_000, holds: Holds = "responses"
) -> Iterator[Batch]:
    """Reads all sources, streaming, in the order given and sorted by path inside each.

    Args:
        sources: The inputs of one pool. File names are made distinct across all of them.
        batch_rows: A batch closes at this many rows and faults, or earlier at 64 Mi characters.
        holds: Whether the records have responses. Those of prompts alone are empty.

    Yields:
        Batches; a batch may span files, and the last one may be short. No batch is empty.

    Raises:
        ValueError: when nothing matches a path, a file is empty or damaged, or no layout can be
            told from its columns. It names the file and the remedy.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be positive, not {batch_rows}")
    if not sources:
        raise ValueError("a pool needs at least one source")
    pending = _Pending()
    for file in input_files(sources):
        for record, outcomes in _read_file(file, holds):
            pending.add(file, record, outcomes)
            if pending.size >= batch_rows or pending.chars >= _BATCH_CHARS:
                yield pending.flush()
    if pending.size:
        yield pending.flush()


def _read_file(
    file: InputFile, holds: Holds
) -> Iterator[tuple[Record | Fault, list[Converted | str]]]:
    """Every record of a file beside its rows, or the reasons they are none."""
    items = read_records(file)
    head, plan = _plan(file, items, holds)
    for item in chain(head, items):
        if isinstance(item, Fault):
            yield item, [item.reason]
        else:
            assert plan is not None, "a readable record comes with a plan"
            yield item, convert(item.value, plan)


def _plan(
    file: InputFile, items: Iterator[Record | Fault], holds: Holds
) -> tuple[list[Record | Fault], Plan | None]:
    """Reads the first records and decides on their columns; no plan if none can be read."""
    head: list[Record | Fault] = []
    records: list[Record] = []
    for item in items:
        head.append(item)
        if isinstance(item, Record):
            records.append(item)
            if len(records) == _PEEK:
                break
    if not records:
        return head, None
    columns = dict.fromkeys(name for record in records for name in record.value)
    try:
        plan = plan_for(file.source, [*columns], file.stem, holds, nulls=file.format not in BINARY)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    outcomes = (outcome for record in records for outcome in convert(record.value, plan))
    if all(outcome == "missing_column" for outcome in outcomes):
        raise ValueError(
            f"{file.path}: no record has every column layout {plan.layout} needs; "
            f"map them in columns; columns seen: {', '.join(columns)}"
        )
    return head, plan


@dataclass
class _Pending:
    """The batch being filled."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    provenance: list[dict[str, Any]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    chars: int = 0

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.quarantine)

    def add(
        self, file: InputFile, record: Record | Fault, outcomes: Sequence[Converted | str]
    ) -> None:
        place = {"file": file.name, "line": record.line}
        aside: set[str] = set()  # of both halves of a pair, once
        for outcome in outcomes:
            if isinstance(outcome, str):
                text = record.excerpt if isinstance(record, Fault) else excerpt(record.value)
                self.quarantine.append({**place, "reason": outcome, "excerpt": text})
                continue
            self.rows.append(outcome.row)
            self.rejected.append(outcome.rejected)
            self.provenance.append({"id": outcome.row["id"], **place, "leftover": outcome.leftover})
            self.chars += sum(len(m["content"]) for m in outcome.row["messages"])
            aside.update(outcome.aside)
        self.aside.update(aside)
        if isinstance(record, Record):
            self.repeated += record.repeated

    def flush(self) -> Batch:
        batch = Batch(
            rows=pa.Table.from_pylist(self.rows, schema=schema.ROW),
            provenance=pa.Table.from_pylist(self.provenance, schema=schema.PROVENANCE),
            quarantine=pa.Table.from_pylist(self.quarantine, schema=schema.QUARANTINE),
            rejected=self.rejected,
            aside=self.aside,
            repeated=self.repeated,
        )
        self.rows, self.provenance, self.quarantine, self.rejected = [], [], [], []
        self.aside, self.repeated, self.chars = Counter(), 0, 0
        return batch
