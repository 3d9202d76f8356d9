"""Builds a pool: raw sources into buckets of rows, identical rows collapsed, nothing lost.

Memory holds one bucket and one batch. Input batches are spilled into one scratch file per bucket;
each bucket is then read back, sorted by id, collapsed, and compared with what the pool already
holds. A bucket that did not change keeps its files; one that only grew gets a delta part; anything
else gets a new base. The manifest comes last.

Responses that are labelled bad ones lie in a table of their own: no stage takes one for a row, and
preference pairs find them there.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.disk import writing
from siftline.ingest.readers import Source, fingerprint, read_sources
from siftline.ingest.source import Holds
from siftline.locks import held
from siftline.rows import schema
from siftline.rows.shards import (
    Manifest,
    Part,
    PartWriter,
    RowHash,
    no_rows,
    read_bucket,
    sync,
    write_text,
)
from siftline.rows.verified import RERUN, AlteredError, SchemaError, content_hash, file_hash

logger = logging.getLogger(__name__)

ROWS, REJECTED, PROVENANCE, QUARANTINE = "rows", "rejected", "provenance", "quarantine"
COUNTED = (ROWS, REJECTED, PROVENANCE, QUARANTINE)
NEWEST = "newest"
"""Beside a pool's manifest: its hash, so that an older copy of it is no pool."""
READING = ("set_aside", "reasons", "repeated_keys", "contradicting_labels")
"""What `info` of a pool's manifest counts: lines of its tables, and what reading met with."""
_SCHEMAS = {
    ROWS: schema.ROW,
    REJECTED: schema.ROW,
    PROVENANCE: schema.PROVENANCE,
    QUARANTINE: schema.QUARANTINE,
}
_ORDER = {
    ROWS: ("id",),
    REJECTED: ("id",),
    PROVENANCE: ("id", "file", "line", "leftover"),
    QUARANTINE: ("file", "line"),
}


@dataclass(frozen=True)
class PoolSpec:
    """A pool or evaluation set, as a recipe states it.

    Attributes:
        name: Its name, shared by all recipes that use it.
        inputs: Where rows come from.
        buckets: Id ranges, a power of two; fixed once the pool exists.
        max_quarantine: Highest share of unreadable input rows that is tolerated.
        holds: `responses`; `prompts` that rejection sampling answers; or, of evaluation sets,
            `either`.
    """

    name: str
    inputs: tuple[Source, ...]
    buckets: int = 16
    max_quarantine: float = 0.05
    holds: Holds = "responses"

    def __post_init__(self) -> None:
        if self.buckets < 1 or self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets must be a power of two, not {self.buckets}")
        if not 0 <= self.max_quarantine <= 1:
            raise ValueError(f"max_quarantine is a share, 0 to 1, not {self.max_quarantine}")


class Pool:
    """Read access to a built pool."""

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.exists():
            raise ValueError(f"pool {folder.name!r} has not been built: materialize it first")
        self.folder = folder
        self.manifest = Manifest.load(path)
        _confirm_newest(path)

    @property
    def version(self) -> str:
        """Hash of the rows, whatever the buckets."""
        return self.manifest.version

    def reading(self, read: Collection[str] = ()) -> dict[str, Any]:
        """What reading met with; see `reading_of`."""
        return reading_of(self.manifest.info, read)

    @property
    def buckets(self) -> int:
        """Number of id ranges."""
        return self.manifest.buckets

    def read(self, table: str, bucket: int, columns: list[str] | None = None) -> pa.Table:
        """Reads one bucket of `rows`, `rejected`, `provenance` or (0 only) `quarantine`, sorted."""
        found = read_bucket(
            self.folder, self.manifest, table, bucket, schema=_SCHEMAS[table], columns=columns
        )
        return _sorted(table, found)

    def rows(self, bucket: int, columns: list[str] | None = None) -> pa.Table:
        """Rows of one bucket, sorted by id."""
        wanted = columns if columns is None or "id" in columns else ["id", *columns]
        return self.read(ROWS, bucket, wanted)

    def all_rows(self, columns: list[str] | None = None) -> pa.Table:
        """All rows sorted by id, for sets that fit memory (evaluation sets do)."""
        return pa.concat_tables(self.rows(b, columns) for b in range(self.buckets))


def _sorted(table: str, data: pa.Table) -> pa.Table:
    """In the table's order, as far as its columns were read: deltas must not show."""
    order = [(name, "ascending") for name in _ORDER[table] if name in data.column_names]
    return data.sort_by(order) if order else data


def collapse(rows: pa.Table) -> pa.Table:
    """Merges rows with equal ids into one with their number of copies, sorted by id.

    Columns outside the identity take the smallest value seen, so input order does not matter. Nor
    does it where texts of one canonical form are written differently: the shortest stays.
    """
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    again = pl.col("id").is_duplicated()
    if frame.select(again.any()).item():
        said = pl.col("messages").list.eval(pl.element().struct.json_encode()).list.join("\n")
        several = frame.filter(again).sort(said.str.len_bytes(), said, "answer", "tools")
        frame = pl.concat([frame.filter(~again), several])
    outside = ["answer_from", "conversation_id"]
    merged = frame.group_by("id", maintain_order=True).agg(
        pl.col("prompt_id", "messages", "answer", "source", "tools").first(),
        pl.col(outside).min(),
        pl.col("copies").sum().cast(pl.Int32),
    )
    return merged.sort("id").select(schema.ROW.names).to_arrow().cast(schema.ROW)


class _Spill:
    """One scratch file per bucket and table, written batch by batch; close it to read."""

    def __init__(self, folder: Path, buckets: int) -> None:
        self.folder, self.buckets = folder, buckets
        self._writers: dict[tuple[str, int], pq.ParquetWriter] = {}
        self._opened = ExitStack()

    def add(self, table: str, data: pa.Table) -> None:
        of = [schema.bucket_of(i, self.buckets) for i in data.column("id").to_pylist()]
        column = pa.array(of, pa.int64())
        for bucket in sorted(set(of)):
            key = (table, bucket)
            if key not in self._writers:
                # A writer of its own file leaves it open where a full disk fails its close.
                sink = self._opened.enter_context(pa.OSFile(str(self._path(table, bucket)), "wb"))
                writer = pq.ParquetWriter(sink, _SCHEMAS[table], compression="lz4")
                self._writers[key] = self._opened.enter_context(writer)
            self._writers[key].write_table(data.filter(pa.compute.equal(column, bucket)))

    def close(self) -> None:
        """Closes every file, whatever fails."""
        self._opened.close()

    def read(self, table: str, bucket: int) -> pa.Table:
        if (table, bucket) not in self._writers:
            return no_rows(_SCHEMAS[table])
        return pq.read_table(self._path(table, bucket)).cast(_SCHEMAS[table])

    def _path(self, table: str, bucket: int) -> Path:
        return self.folder / f"{table}-{bucket}.parquet"


@dataclass
class _Notes:
    """What was counted while reading.

    Attributes:
        aside: Records that said something in a column or key that was not read, by its name.
        reasons: Input rows that are none, by reason.
        repeated: Keys that stood in an object twice.
        contradicting: Rows labelled good in one place and bad in another; the bad label counts.
    """

    aside: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    contradicting: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "set_aside": dict(sorted(self.aside.items())),
            "reasons": dict(sorted(self.reasons.items())),
            "repeated_keys": self.repeated,
            "contradicting_labels": self.contradicting,
        }


def reading_of(info: Mapping[str, Any], read: Collection[str] = ()) -> dict[str, Any]:
    """What reading met with, by the names of `READING`.

    Args:
        info: Of the pool's manifest, which knows no recipe.
        read: Columns that no field takes and somebody reads all the same: they are not set aside.
    """
    found = {key: info[key] for key in READING if key in info}
    if "set_aside" in found:
        found["set_aside"] = {n: k for n, k in found["set_aside"].items() if n not in read}
    return found


def notes_of(info: Mapping[str, Any], read: Collection[str] = ()) -> list[str]:
    """What a manifest's `info` says about the reading that a user should see; one line each.

    Args:
        info: Of the pool's manifest.
        read: As in `reading_of`.
    """
    lines = []
    aside = reading_of(info, read).get("set_aside")
    if aside:
        named = ", ".join(f"{name} ({n:,})" for name, n in _most(aside))
        lines.append(f"set aside, not read: {named}")
    if info.get("reasons"):
        named = ", ".join(f"{name} {n:,}" for name, n in _most(info["reasons"]))
        lines.append(f"quarantined: {named}")
    if info.get(REJECTED):
        lines.append(f"labelled bad, for preference pairs only: {info[REJECTED]:,} rows")
    if info.get("contradicting_labels"):
        lines.append(f"labelled good and bad, taken as bad: {info['contradicting_labels']:,} rows")
    if info.get("repeated_keys"):
        lines.append(f"keys given twice, the last one read: {info['repeated_keys']:,}")
    return lines


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def build_pool(
    folder: Path,
    spec: PoolSpec,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    apart: bool = True,
    read: Collection[str] = (),
) -> Manifest:
    """Builds or updates the pool in `folder` from its sources.

    Args:
        folder: The pool's folder.
        spec: Name, inputs, buckets and the tolerated rate of unreadable rows.
        progress: Called with the number of input rows of each batch read.
        apart: Whether responses that are labelled bad lie apart; else they are rows like others.
        read: Columns of the input that somebody reads beside the rows: no warning about those.

    Returns:
        The manifest; the one on disk, untouched, where neither inputs nor `spec` changed. Where
        another process builds the pool, this one waits for it.

    Raises:
        ValueError: if no row could be read, too many could not, or `buckets` changed.
    """
    path = folder / "manifest.json"
    inputs = content_hash([fingerprint(spec.inputs), spec.max_quarantine, spec.holds, apart])
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_builder(folder) as scratch:
        old = Manifest.found(path)
        if old is not None:
            if old.info["name"] != spec.name:
                raise AlteredError(
                    f"{path} was replaced by that of pool {old.info['name']!r}: {RERUN}"
                )
            if old.buckets != spec.buckets:
                raise ValueError(
                    f"pool {spec.name!r} has {old.buckets} buckets and can't be recut to "
                    f"{spec.buckets}: give the new one another name, or delete {folder}"
                )
            if old.info["inputs"] == inputs and all(_there(folder, p) for p in old.parts):
                write_text(folder / NEWEST, f"{file_hash(path)}\n")
                return old
        notes = _Notes()
        spill, quarantine = _read(spec, scratch, progress, notes, apart=apart)
        manifest = _write(folder, spec, inputs, old, spill, quarantine, notes)
        _put(path, manifest)
    if notes.aside.keys() - set(read):
        logger.warning("pool %s: %s", spec.name, notes_of({"set_aside": notes.aside}, read)[0])
    return manifest


def _put(path: Path, manifest: Manifest) -> None:
    """Writes a pool's manifest, and beside it that this is the newest one.

    An older manifest is valid by itself and may find its parts, so a stage that is run alone would
    take a copy of it for the pool. At every moment the manifest that is there is one of those
    named; a killed build leaves two.
    """
    draft = path.with_name(f".{path.name}.draft")
    manifest.save(draft)
    names = [file_hash(draft), *([file_hash(path)] if path.exists() else [])]
    write_text(path.with_name(NEWEST), "\n".join(names) + "\n")
    draft.replace(path)
    sync(path.parent)
    write_text(path.with_name(NEWEST), names[0] + "\n")


def _confirm_newest(path: Path) -> None:
    """Refuses a manifest that another one has replaced.

    Raises:
        AlteredError: naming it.
    """
    for _ in range(2):  # it may be replaced just now
        try:
            named = path.with_name(NEWEST).read_text(encoding="utf-8", errors="replace").split()
        except FileNotFoundError:  # of an earlier version
            return
        if file_hash(path) in named:
            return
    raise AlteredError(
        f"{path} is not the newest manifest of its pool, which {NEWEST} beside it names: run the "
        "recipe, it makes the pool again where that is another one"
    )


def _there(folder: Path, part: Part) -> bool:
    return (folder / part.file).exists()


@contextmanager
def _sole_builder(folder: Path) -> Iterator[Path]:
    """Holds the pool for writing; yields an empty scratch folder that is removed at the end.

    The lock belongs to the process, so that of a killed one is free at once.
    """
    with held(folder / ".lock", str(folder), wait=True), writing(folder):
        for left in (*folder.glob(".*.parquet*"), *folder.glob(".manifest.json.*")):  # by a kill
            left.unlink()
        scratch = folder / ".scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _read(
    spec: PoolSpec,
    scratch: Path,
    progress: Callable[[int], None],
    notes: _Notes,
    *,
    apart: bool,
) -> tuple[_Spill, pa.Table]:
    spill = _Spill(scratch, spec.buckets)
    quarantined: list[pa.Table] = []
    read = 0
    with closing(spill):
        for batch in read_sources(spec.inputs, holds=spec.holds):
            bad = pa.array(batch.rejected, pa.bool_())
            if apart and any(batch.rejected):
                spill.add(ROWS, batch.rows.filter(pa.compute.invert(bad)))
                spill.add(REJECTED, batch.rows.filter(bad))
            else:
                spill.add(ROWS, batch.rows)
            spill.add(PROVENANCE, batch.provenance)
            quarantined.append(batch.quarantine)
            notes.aside.update(batch.aside)
            notes.repeated += batch.repeated
            read += batch.provenance.num_rows
            progress(batch.provenance.num_rows + batch.quarantine.num_rows)
    quarantine = pa.concat_tables([no_rows(schema.QUARANTINE), *quarantined])
    quarantine = _sorted(QUARANTINE, quarantine)
    notes.reasons.update(quarantine.column("reason").to_pylist())
    bad_rows, total = quarantine.num_rows, read + quarantine.num_rows
    first = f"{_where(quarantine)}" if bad_rows else ""
    if not read:
        raise ValueError(f"pool {spec.name!r}: no readable row among {total} {first}".rstrip())
    if bad_rows > spec.max_quarantine * total:
        raise ValueError(
            f"pool {spec.name!r}: {bad_rows} of {total} input rows can't be read, more than "
            f"max_quarantine {spec.max_quarantine:g} {first}"
        )
    return spill, quarantine


def _where(quarantine: pa.Table) -> str:
    row = quarantine.slice(0, 1).to_pylist()[0]
    return f"(first: {row['file']} line {row['line']}, {row['reason']})"


def _write(
    folder: Path,
    spec: PoolSpec,
    inputs: str,
    old: Manifest | None,
    spill: _Spill,
    quarantine: pa.Table,
    notes: _Notes,
) -> Manifest:
    writer = PartWriter(folder)
    # Buckets in order are the pool in id order, so the cut does not show.
    version, of_rejected = RowHash(), RowHash()
    for bucket in range(spec.buckets):
        rows, rejected = (collapse(spill.read(table, bucket)) for table in (ROWS, REJECTED))
        twice = pa.compute.is_in(rows["id"], rejected["id"].combine_chunks())
        notes.contradicting += pa.compute.sum(twice).as_py() or 0
        rows = rows.filter(pa.compute.invert(twice))
        version.update(rows)
        of_rejected.update(rejected)
        _write_bucket(writer, folder, old, REJECTED, bucket, rejected)
        _write_bucket(writer, folder, old, ROWS, bucket, rows)
        lines = _sorted(PROVENANCE, spill.read(PROVENANCE, bucket))
        _write_bucket(writer, folder, old, PROVENANCE, bucket, lines)
    writer.add(QUARANTINE, 0, quarantine)
    parts = tuple(writer.parts)
    counts = {t: sum(p.rows for p in parts if p.table == t) for t in _SCHEMAS}
    info = {"name": spec.name, "inputs": inputs, **counts, **notes.as_json(), "holds": spec.holds}
    named = version.hexdigest()
    if counts[REJECTED]:
        named = content_hash([named, of_rejected.hexdigest()])
    return Manifest(named, spec.buckets, parts, info)


def _write_bucket(
    writer: PartWriter, folder: Path, old: Manifest | None, table: str, bucket: int, data: pa.Table
) -> None:
    """Writes a bucket as: its old parts, its old parts plus a delta, or a new base."""
    kept = [p for p in old.parts if (p.table, p.bucket) == (table, bucket)] if old else []
    if kept and all(_there(folder, part) for part in kept):
        assert old is not None
        try:
            before = read_bucket(folder, old, table, bucket, schema=_SCHEMAS[table])
        except SchemaError:  # of a version with other columns
            writer.add(table, bucket, data)
            return
        known = set(map(repr, before.to_pylist()))
        now = data.to_pylist()
        fresh = pa.array([repr(row) not in known for row in now], pa.bool_())
        if len(now) - sum(fresh.to_pylist()) == before.num_rows:
            writer.parts.extend(kept)
            writer.add(table, bucket, data.filter(fresh))
            return
    writer.add(table, bucket, data)
