"""`siftline dedup` on conversations: the duplicates gate of a recipe, on plain files.

Rows are read as ingestion reads them and decided about by the selector that recipes use, so that a
file and a pool of the same rows lose the same rows. Keep order is that of the command line: policy,
then row.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.dedup.arrow import arrow_of
from siftline.dedup.engine import Clock, Deduplicated
from siftline.dedup.files import Table, open_tables, read_pieces
from siftline.dedup.output import MakeTracker, claim, first_rows, row_names, summary, write_out
from siftline.ingest.layouts import Plan, convert, plan_for
from siftline.ingest.source import Source
from siftline.kernels.sets.keepers import Keep, as_integers
from siftline.progress import Tracker
from siftline.rows import schema
from siftline.rows.shards import building, write_parquet
from siftline.stages.duplicates.decide import Duplicates
from siftline.stages.duplicates.state import StateFiles

CONFLICTS, SCRATCH = "conflicts", ".scratch"
GROUP = "sift_prompt_group"


@dataclass(frozen=True)
class Conversations:
    """What is to be done.

    Attributes:
        files: Files of any format that recipes read; their order is row order.
        out: Folder that the result is written to.
        columns: Field -> column: `messages`, or `prompt` and `completion`; and `answer`, or not.
        gate: How rows are compared.
        keep: Which copy stays.
        rehydrate: Say how often to repeat each kept row.
    """

    files: tuple[str, ...]
    out: Path
    columns: dict[str, str]
    gate: Duplicates = field(default_factory=Duplicates)
    keep: Keep = field(default_factory=Keep)
    rehydrate: bool = False

    def __post_init__(self) -> None:
        if set(self.columns) - {"answer"} not in ({"messages"}, {"prompt", "completion"}):
            raise ValueError(
                "conversations are --prompt-column and --response-column, or --messages-column: "
                f"give one of the two, not {', '.join(self.columns.values())}"
            )
        if self.keep.policy == "none":
            raise ValueError("keep=none is for texts: of conversations the first copy stays")

    @property
    def source(self) -> Source:
        """The columns as ingestion takes them."""
        layout: Any = "messages" if "messages" in self.columns else "prompt_completion"
        return Source("files", layout=layout, columns=self.columns)


@dataclass(frozen=True)
class _Read:
    """Rows after one reading; arrays of shape (n,).

    Attributes:
        files: What the gate knows of them.
        answers: id, prompt_id, answer and answer_from of the rows that could be read.
        groups: Their prompt_ids; null of others.
        unreadable: Rows that are no conversation, by reason.
    """

    files: StateFiles
    answers: pl.DataFrame
    groups: pa.Array
    unreadable: dict[str, int]


def dedup_conversations(job: Conversations, make_tracker: MakeTracker) -> dict[str, Any]:
    """Does a job; returns its counts and the seconds of its phases.

    Band keys and shingles of many rows lie in scratch files until they are decided about, as those
    of texts do. Rows that are no conversation (see `ingest`) are kept and counted by reason.

    Args:
        job: What to do.
        make_tracker: Takes label, total and unit of a step.

    Raises:
        ValueError: if a file can't be read or lacks a column, the output folder is not empty, or
            there are more rows than can be decided about at once.
    """
    claim(job.out)
    clock = Clock()
    needed = [*job.columns.values(), *([job.keep.column] if job.keep.column else [])]
    with building(job.out) as folder:
        with clock.phase("open"):
            tables = open_tables(job.files, needed, folder / SCRATCH)
            starts = first_rows(tables)
            _check_rows(job, int(starts[-1]))
        with clock.phase("read"):
            tracker = make_tracker("read", int(starts[-1]), "rows")
            read = _read(job, tables, StateFiles(folder / SCRATCH), tracker)
            tracker.close()
        with clock.phase("decide"):
            plan = job.gate.decide(read.files.states, read.files.make_room)
            selection = job.gate.apply(read.answers, plan)
        named = row_names(tables, starts)
        result = _as_rows(selection.removed, int(starts[-1]), plan.facts["candidate_pairs"])
        with clock.phase("write"):
            more = {GROUP: read.groups}
            write_out(folder, tables, starts, result, named, make_tracker, job.rehydrate, more)
            if "answer" in job.columns:
                (folder / CONFLICTS).mkdir()
                path = folder / CONFLICTS / "part-00000.parquet"
                write_parquet(_conflicts(selection.tables["conflicts"], named), path)
        rmtree(folder / SCRATCH, ignore_errors=True)
    return {
        "out": str(job.out),
        **summary(result),
        "threshold": job.gate.threshold,
        "prompts": read.answers["prompt_id"].n_unique(),
        "alternatives": _alternatives(read.answers, selection.kept),
        "conflicting_prompts": len(plan.conflicts),
        "unreadable": read.unreadable,
        "repeated_keys": sum(table.repeated for table in tables),
        "seconds": {name: round(value, 4) for name, value in clock.seconds.items()},
    }


def _check_rows(job: Conversations, n: int) -> None:
    if n > job.gate.max_rows:
        raise ValueError(
            f"{n:,} conversations are more than the {job.gate.max_rows:,} that are decided about "
            "at once: give the files by source or topic"
        )


def _read(
    job: Conversations, tables: Sequence[Table], files: StateFiles, tracker: Tracker
) -> _Read:
    answers: list[pl.DataFrame] = []
    groups: list[pa.Array] = []
    unreadable: Counter[str] = Counter()
    at = 0
    for table in tables:
        try:
            plan = plan_for(job.source, table.own.names, "files")
        except ValueError as error:
            raise ValueError(f"{table.name}: {error}") from error
        columns = plan.columns(table.own.names)
        extra = [job.keep.column] if job.keep.column else []
        for batch in read_pieces(table, list(dict.fromkeys([*columns, *extra]))):
            view, reasons = _views(batch.select(columns).to_pylist(), plan, at)
            unreadable.update(reasons)
            column = batch.column(job.keep.column) if job.keep.column else None
            try:
                priority = _priority(job.keep, view, column, batch.num_rows, at)
            except ValueError as error:
                raise ValueError(f"{table.name}: {error}") from error
            if view.height:
                files.add(job.gate.summarise(view.with_columns(priority=priority)))
                answers.append(view.select("id", "prompt_id", "answer", "answer_from"))
            groups.append(_spread(view, batch.num_rows, at))
            at += batch.num_rows
            tracker.advance(batch.num_rows)
    if not files.states:  # nothing to decide about is decided about like the rest
        nothing = schema.text_view(schema.ROW.empty_table(), everything=True)
        files.add(job.gate.summarise(nothing))
        answers = [nothing.select("id", "prompt_id", "answer", "answer_from")]
    everyone = pa.concat_arrays(groups) if groups else pa.nulls(0, pa.string())
    return _Read(files, pl.concat(answers), everyone, dict(sorted(unreadable.items())))


def _views(records: list[dict[str, Any]], plan: Plan, at: int) -> tuple[pl.DataFrame, list[str]]:
    """The texts of the conversations among some records, their ids row numbers; and the faults."""
    rows, numbers, reasons = [], [], []
    for number, record in enumerate(records, at):
        found = convert(record, plan)[0]  # a second response beside it is not compared
        if isinstance(found, str):
            reasons.append(found)
        else:
            rows.append(found.row)
            numbers.append(f"{number:012d}")
    view = schema.text_view(pa.Table.from_pylist(rows, schema.ROW), everything=True)
    # Ids break ties: as row numbers they make the keep order that of the rows.
    return view.with_columns(pl.Series("id", numbers, pl.String)), reasons


def _priority(
    keep: Keep, view: pl.DataFrame, column: pa.Array | None, n: int, at: int
) -> pl.Series:
    """The policy of the rows of `view` as integers of the same order."""
    places = view["id"].cast(pl.Int64).to_numpy() - at
    assert len(places) <= n, f"{len(places)} of {n} rows"
    texts = arrow_of([p + r for p, r in view.select("prompt", "response").rows()])
    taken = None if column is None else column.take(arrow_of(places))
    return pl.Series("priority", as_integers(keep.priority(texts, taken)))


def _spread(view: pl.DataFrame, n: int, at: int) -> pa.Array:
    groups = np.full(n, None, object)
    groups[view["id"].cast(pl.Int64).to_numpy() - at] = view["prompt_id"].to_list()
    return pa.array(groups.tolist(), pa.string())


def _as_rows(removed: pl.DataFrame, n: int, pairs: int) -> Deduplicated:
    """The gate's decisions by row number."""
    lost = removed["id"].cast(pl.Int64).to_numpy()
    matched, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float64)
    exact = np.zeros(n, np.bool_)
    matched[lost] = removed["matched_id"].cast(pl.Int64).to_numpy()
    similarity[lost] = removed["value"].to_numpy()
    exact[lost] = (removed["reason"] == "exact_duplicate").to_numpy()
    return Deduplicated(matched, similarity, exact, pairs, {})


def _alternatives(answers: pl.DataFrame, kept: pl.Series) -> int:
    """Kept rows whose prompt another kept row has."""
    stays = answers.join(kept.to_frame(), on="id", how="semi")
    return stays.filter(pl.len().over("prompt_id") > 1).height


def _conflicts(table: pl.DataFrame, named: Any) -> pa.Table:
    """Prompts with contradicting answers, the rows by file and number."""
    ids = table["ids"].to_list()
    rows = [named(np.array([int(i) for i in row], np.int64)) for row in ids]
    columns = {
        GROUP: table["prompt_id"].to_list(),
        "sift_rows": rows,
        "answers": table["answers"].to_list(),
    }
    kinds = [pa.string(), pa.list_(pa.string()), pa.list_(pa.string())]
    return pa.table(columns, pa.schema(list(zip(columns, kinds, strict=True))))
