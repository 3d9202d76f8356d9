"""Decisions about rows written beside the rows: `data/`, `removed/` and what else there is."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.api.judge import UNREAD, Judged, Read
from siftline.deduplication.files import Table
from siftline.deduplication.output import (
    DATA,
    FACTS,
    MakeTracker,
    Part,
    first_rows,
    published,
    write_out,
)
from siftline.ingest.records import BINARY, Record, read_records
from siftline.rows.ledger import FAILED, KEPT, REMOVED
from siftline.rows.schema import HALF_ID
from siftline.rows.shards import write_parquet

QUARANTINE, CONFLICTS = "quarantine", "conflicts"
GROUP = "sift_prompt_group"
FACT_NAMES = tuple(field.name for field in FACTS)
_QUARANTINE = pa.schema(
    [("sift_row", pa.string()), ("sift_reason", pa.string()), ("excerpt", pa.string())]
)


@dataclass(frozen=True)
class Decided:
    """Rows with their decisions, and what they are called.

    Attributes:
        kind: Of the stage.
        judged: What it decided.
        names: What the rows of each file are called.
        other_names: The same of the sets that were compared with.
    """

    kind: str
    judged: Judged
    names: tuple[str, ...]
    other_names: tuple[str, ...] = ()

    def named(self, places: np.ndarray) -> list[str]:
        """Rows as NAME:ROW, the first of a file is 1."""
        return _named(self.judged.lines, self.names, places)

    def lost_to(self, places: np.ndarray) -> list[str | None]:
        """The rows that some rows were removed for, None where it was for none."""
        matched = self.judged.lines["matched"].gather(places)
        there = matched.is_not_null().to_numpy()
        names = self.other_names if self.judged.sets else self.names
        found = _named(self.judged.compared, names, matched.drop_nulls().to_numpy())
        lost: list[str | None] = [None] * len(places)
        for place, name in zip(np.flatnonzero(there).tolist(), found, strict=True):
            lost[place] = name
        return lost

    def places(self, outcome: str) -> np.ndarray:
        """Rows of an outcome, int64, ascending."""
        return (self.judged.lines["outcome"] == outcome).arg_true().to_numpy().astype(np.int64)

    def facts(self, places: np.ndarray) -> dict[str, list[Any]]:
        """Why some rows were removed, by the names of `FACTS`."""
        lines = self.judged.lines[places]
        lost = lines["matched_id"].is_not_null() | lines["matched"].is_not_null()
        similar = lines.select(pl.when(lost).then("value")).to_series()
        columns = [
            *(lines[name].to_list() for name in ("reason", "value", "threshold", "matched_id")),
            self.lost_to(places),
            similar.to_list(),
        ]
        found = dict(zip(FACT_NAMES, columns, strict=True))
        if not self.has_ids:
            del found["sift_matched_id"]
        return found

    @property
    def has_ids(self) -> bool:
        """Whether rows have ids; those of plain texts have none."""
        return self.judged.lines["id"].null_count() < self.judged.lines.height

    @property
    def grouped(self) -> tuple[pa.Field, ...]:
        """The column of duplicates that says which rows answer one prompt."""
        both = self.kind == "duplicates" and self.has_ids
        return (pa.field(GROUP, pa.string()),) if both else ()

    @property
    def sizes(self) -> np.ndarray:
        """int64, one a row: a kept row and those removed for it."""
        lines = self.judged.lines
        lost = lines["matched"].drop_nulls().to_numpy().astype(np.int64)
        return np.bincount(lost, minlength=lines.height) + 1

    def counts(self) -> dict[str, Any]:
        """What became of how many rows, as the verbs print it."""
        lines, judged = self.judged.lines, self.judged
        counts = dict(lines["outcome"].value_counts().iter_rows())
        gone = lines.filter(pl.col("outcome").is_in([REMOVED, FAILED]))["reason"].value_counts()
        unread = judged.quarantine["reason"].value_counts().sort("reason")
        return {
            "rows": lines.height,
            **{name: counts.get(name, 0) for name in (KEPT, REMOVED, FAILED, UNREAD)},
            "reasons": dict(gone.sort(["count", "reason"], descending=[True, False]).iter_rows()),
            "unreadable": dict(unread.iter_rows()),
            "labelled_bad": judged.unjudged,
            "set_aside": dict(judged.reading.get("set_aside", {})),
            "repeated_keys": judged.reading.get("repeated_keys", 0),
        }


def _named(lines: pl.DataFrame, names: Sequence[str], places: np.ndarray) -> list[str]:
    rows = lines.select("file", "line")[places.astype(np.int64)].rows()
    return [f"{names[file]}:{line}" for file, line in rows]


def unread_lines(read: Read) -> list[frozenset[int]]:
    """Of each file, the lines that are no rows."""
    lost = read.lines.filter(outcome=UNREAD)
    return [frozenset(lost.filter(file=k)["line"].to_list()) for k in range(len(read.files))]


def in_tables(read: Read) -> np.ndarray:
    """bool, one a row: whether it is in the tables of `deduplication.files.open_read`."""
    binary = [k for k, file in enumerate(read.files) if file.format in BINARY]
    there = (pl.col("outcome") != UNREAD) | pl.col("file").is_in(binary)
    return read.lines.select(there).to_series().to_numpy()


def write_decided(
    folder: Path,
    tables: Sequence[Table],
    decided: Decided,
    make_tracker: MakeTracker,
    rehydrate: bool = False,
) -> None:
    """Writes `data/`, `removed/`, and where there is any `failed/`, `quarantine/`, `conflicts/`.

    Args:
        folder: There, and empty.
        tables: The rows, see `in_tables`.
        decided: What was decided about them.
        make_tracker: Takes label, total and unit of a step.
        rehydrate: Of duplicates, say how often to repeat a row.
    """
    places = np.flatnonzero(in_tables(decided.judged))
    starts = first_rows(tables)
    assert starts[-1] == len(places), f"{starts[-1]} rows of {len(places)}"
    parts = [_kept(decided, places, rehydrate), _gone(decided, places, REMOVED)]
    if len(decided.places(FAILED)):
        parts.append(_gone(decided, places, FAILED))
    write_out(folder, tables, starts, parts, make_tracker)
    _write_more(folder, decided)


def write_records(
    folder: Path, records: Iterable[tuple[int, Mapping[str, Any]]], decided: Decided
) -> None:
    """Writes what `write_decided` does as JSONL, for rows that no table holds.

    Args:
        folder: There, and empty.
        records: Places of rows, ascending, and what they hold; those that can't be read left out.
        decided: What was decided about them.
    """
    outcomes = decided.judged.lines["outcome"].to_list()
    names = dict.fromkeys([DATA, REMOVED, *([FAILED] if FAILED in outcomes else [])])
    sizes = decided.sizes
    with ExitStack() as opened:
        streams = {}
        for name in names:
            (folder / name).mkdir()
            path = folder / name / "part-00000.jsonl"
            stream = opened.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            streams[KEPT if name == DATA else name] = stream
        for place, record in records:
            rows = np.array([place])
            more: dict[str, Any] = {}
            if decided.grouped:
                more[GROUP] = _groups(decided, rows)[0][0].as_py()
            if outcomes[place] != KEPT:
                more |= {name: values[0] for name, values in decided.facts(rows).items()}
            elif decided.kind == "duplicates":
                more["sift_cluster_size"] = int(sizes[place])
            line = json.dumps({**record, **more}, ensure_ascii=False, default=_plain)
            streams[outcomes[place]].write(line + "\n")
    _write_more(folder, decided)


def _plain(value: Any) -> Any:
    """Values of frames that JSON has no word for."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def file_records(judged: Read) -> Iterator[tuple[int, dict[str, Any]]]:
    """Places and records of the rows that files hold, those that can't be read left out."""
    at = 0
    for k, file in enumerate(judged.files):
        lines = judged.lines.filter(file=k).select("line", "outcome").rows()
        places = {line: at + n for n, (line, outcome) in enumerate(lines) if outcome != UNREAD}
        at += len(lines)
        for item in read_records(file):
            if isinstance(item, Record) and item.line in places:
                yield places[item.line], item.value


def _write_more(folder: Path, decided: Decided) -> None:
    """Writes `quarantine/` and `conflicts/` where there is something."""
    lost = decided.judged.quarantine
    if lost.height:
        (folder / QUARANTINE).mkdir()
        shown = dict(zip((file.name for file in decided.judged.files), decided.names, strict=True))
        names = [f"{shown[file]}:{line}" for file, line in lost.select("file", "line").rows()]
        columns = [names, lost["reason"].to_list(), lost["excerpt"].to_list()]
        path = folder / QUARANTINE / "part-00000.parquet"
        write_parquet(pa.table(columns, schema=_QUARANTINE), path)
    table = conflicts(decided)
    if table.num_rows:
        (folder / CONFLICTS).mkdir()
        write_parquet(table, folder / CONFLICTS / "part-00000.parquet")


def _kept(decided: Decided, places: np.ndarray, rehydrate: bool) -> Part:
    rows = np.isin(places, decided.places(KEPT))
    if decided.kind != "duplicates":
        return Part(DATA, rows)
    sizes, groups = decided.sizes, decided.grouped
    names = ["sift_cluster_size", *(["sift_weight"] if rehydrate else [])]
    fields = (*groups, *(pa.field(name, pa.int64()) for name in names))

    def values(numbers: np.ndarray) -> list[Any]:
        found = sizes[places[numbers]]
        weights = [published(found)] if rehydrate else []
        return [*_groups(decided, places[numbers]), found, *weights]

    return Part(DATA, rows, fields, values)


def _gone(decided: Decided, places: np.ndarray, outcome: str) -> Part:
    facts = [f for f in FACTS if decided.has_ids or f.name != "sift_matched_id"]

    def values(numbers: np.ndarray) -> list[Any]:
        found = decided.facts(places[numbers])
        made = [pa.array(found[field.name], field.type) for field in facts]
        return [*_groups(decided, places[numbers]), *made]

    rows = np.isin(places, decided.places(outcome))
    return Part(outcome, rows, (*decided.grouped, *facts), values)


def _groups(decided: Decided, places: np.ndarray) -> list[pa.Array]:
    if not decided.grouped:
        return []
    ids = decided.judged.lines["id"].gather(places).str.slice(0, HALF_ID)
    return [pa.array(ids.to_list(), pa.string())]


def conflicts(decided: Decided) -> pa.Table:
    """Prompts with contradicting answers, the rows by name."""
    found = decided.judged.tables.get("conflicts")
    kinds = [
        pa.field(GROUP, pa.string()),
        pa.field("sift_rows", pa.list_(pa.string())),
        pa.field("answers", pa.list_(pa.string())),
    ]
    if found is None or found.is_empty():
        return pa.schema(kinds).empty_table()
    lines = decided.judged.lines.with_row_index("place").filter(pl.col("id").is_not_null())
    first = lines.unique("id", keep="first", maintain_order=True)
    where = dict(first.select("id", "place").iter_rows())
    columns: list[list[Any]] = [[], [], []]
    for prompt, ids, answers in found.select("prompt_id", "ids", "answers").iter_rows():
        listed = sorted(zip((where[i] for i in ids), answers, strict=True))
        columns[0].append(prompt)
        columns[1].append(decided.named(np.array([place for place, _ in listed])))
        columns[2].append([answer for _, answer in listed])
    return pa.table(columns, schema=pa.schema(kinds))


def write_jsonl(stream: IO[str], judged: Judged) -> None:
    """Writes the kept records as they are, one a line."""
    outcomes = judged.lines["outcome"].to_list()
    for place, record in file_records(judged):
        if outcomes[place] == KEPT:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
