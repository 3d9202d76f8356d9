"""One stage on some sources: a pool made from them, the stage's own run, and its decision by row.

What a recipe does in many assets is done here in a folder that goes afterwards: `ingest` reads the
rows into a pool, the stage of the kind that is asked runs on it, and every row that was read finds
its decision again by the place it was read from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl

from siftline.ingest.files import InputFile, input_files
from siftline.ingest.pool import PROVENANCE, QUARANTINE, REJECTED, Pool, PoolSpec, build_pool
from siftline.ingest.source import Holds, Source
from siftline.progress import Tracker
from siftline.recipe.parse import Recipe, parse
from siftline.recipe.sections import Sets
from siftline.rows.ledger import KEPT, REMOVED
from siftline.stages.context import Context
from siftline.stages.models import engines
from siftline.workspace import Workspace

MakeTracker = Callable[[str, int, str], Tracker]
UNREAD = "quarantined"
"""Outcome of a row that could not be read; the others are those of the ledger."""
LINES = {
    "file": pl.Int32,
    "line": pl.Int64,
    "id": pl.String,
    "outcome": pl.String,
    "reason": pl.String,
    "value": pl.Float64,
    "threshold": pl.Float64,
    "matched_id": pl.String,
    "matched": pl.Int64,
}
_BYTES = 64 << 20
"""Bytes of input for each bucket of the pool."""
QUARANTINED = dict.fromkeys(("file", "reason", "excerpt"), pl.String) | {"line": pl.Int64}


@dataclass(frozen=True)
class Read:
    """What was read, and what became of it.

    Attributes:
        files: In order.
        lines: One line an input row, in input order: number of its file, line or row in it from 1,
            id (null where it is none, or labelled a bad response), outcome, and of rows that were
            judged the further columns of `LINES`.
    """

    files: tuple[InputFile, ...]
    lines: pl.DataFrame


@dataclass(frozen=True)
class Judged(Read):
    """What a stage decided about the rows of some sources.

    `matched` of a line is the place, from 0, of the row that it lost to: in `lines` or, of a stage
    that compares with other sets, in the lines of these, one set behind the other.

    Attributes:
        sets: The sets that were compared with.
        options: All options of the stage.
        facts: What the stage reports.
        tables: Its side tables.
        quarantine: file, line, reason and excerpt of what could not be read.
        reading: What else reading met with; see `Pool.reading`.
        unjudged: Rows labelled as bad responses, which no stage judges; they stay.
    """

    sets: tuple[Read, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    quarantine: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=QUARANTINED))
    reading: Mapping[str, Any] = field(default_factory=dict)
    unjudged: int = 0

    @property
    def compared(self) -> pl.DataFrame:
        """file, line and id of the rows that `matched` counts; files are numbered over all sets."""
        if not self.sets:
            return self.lines.select("file", "line", "id")
        firsts = accumulate((len(read.files) for read in self.sets), initial=0)
        parts = [
            read.lines.select((pl.col("file") + first).cast(pl.Int32), "line", "id")
            for read, first in zip(self.sets, firsts, strict=False)
        ]
        return pl.concat(parts)


def judge(
    kind: str,
    options: Mapping[str, Any],
    sources: Sequence[Source],
    scratch: Path,
    *,
    against: Mapping[str, Sequence[Source]] | None = None,
    holds: Holds = "responses",
    make_tracker: MakeTracker | None = None,
    emit: Callable[[str], None] = lambda line: None,
) -> Judged:
    """Runs one stage on a pool of its own.

    Args:
        kind: Name of a kind of stage.
        options: Its options as a recipe states them.
        sources: Where the rows are.
        scratch: Folder for everything that is needed on the way.
        against: Test sets by name.
        holds: What the rows are.
        make_tracker: Takes label, total and unit of a step.
        emit: Takes a line of progress.

    Raises:
        ValueError: if an option is wrong, no row can be read, or no layout fits.
    """
    recipe = _recipe(kind, options)
    workspace = Workspace(scratch)
    files = tuple(input_files(sources))
    spec = PoolSpec("rows", tuple(sources), _buckets(files), 1.0, holds)
    sets = tuple(
        PoolSpec(name, tuple(those), 1, 1.0, "either") for name, those in (against or {}).items()
    )
    recipe = replace(recipe, pool=spec, sets=Sets(test=sets))
    stage = recipe.stages[0]
    for one in (spec, *sets):
        _read(workspace.pool(one.name), one, make_tracker, stage.options)
    pool = Pool(workspace.pool("rows"))
    with engines() as opened:
        context = Context(workspace, recipe, stage, pool, (), opened, emit)
        run = stage.of.runner()(context)
    decided = pl.concat([pl.DataFrame(r.to_table()) for r in run.results])
    decided = decided.select(
        "id",
        *("value", "threshold", "matched_id"),
        *(pl.col(name).alias(f"{name}_then") for name in ("outcome", "reason")),
    )
    lines, unread = _places(pool, files)
    unjudged = lines.filter(pl.col("id").is_null() & (pl.col("outcome") == KEPT)).height
    lines = lines.join(decided, on="id", how="left", maintain_order="left").with_columns(
        outcome=pl.coalesce("outcome_then", "outcome"), reason=pl.coalesce("reason_then", "reason")
    )
    read = [
        Read(known, _places(Pool(workspace.pool(one.name)), known)[0])
        for one in sets
        for known in [tuple(input_files(one.inputs))]
    ]
    if kind == "duplicates":
        lines = _without_copies(lines)
    judged = Judged(
        files,
        lines,
        tuple(read),
        asdict(stage.options),
        run.facts,
        run.tables,
        unread,
        pool.reading(_columns_read(stage.options)),
        unjudged,
    )
    return replace(judged, lines=_with_matched(lines, judged.compared))


def _recipe(kind: str, options: Mapping[str, Any]) -> Recipe:
    """A recipe of one stage, its options validated as those of any recipe."""
    said = {
        "name": "api",
        "pool": {"name": "rows", "inputs": [{"path": "rows"}]},
        "models": {"none": {"path": "none"}},
        "stages": [{kind: dict(options)}],
        "budget": {"unit": "rows", "size": 1},
    }
    try:
        return parse(said)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("stages.")) from error


def _columns_read(options: Any) -> tuple[str, ...]:
    return tuple(getattr(options, "input_columns", tuple)())


def _buckets(files: Sequence[InputFile]) -> int:
    """A power of two: no decision depends on it, memory does."""
    size = sum(file.fs.size(file.path) or 0 for file in files if file.fs is not None)
    many = min(64, max(1, size // _BYTES))
    return 1 << (int(many) - 1).bit_length()


def _read(folder: Path, spec: PoolSpec, make_tracker: MakeTracker | None, options: Any) -> None:
    read = _columns_read(options)
    if make_tracker is None:
        build_pool(folder, spec, read=read)
        return
    tracker = make_tracker(f"read {spec.name}", 0, "rows")
    try:
        build_pool(folder, spec, tracker.advance, read=read)
    finally:
        tracker.close()


def _frame(pool: Pool, table: str, bucket: int, columns: list[str]) -> pl.DataFrame:
    frame = pl.from_arrow(pool.read(table, bucket, columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _places(pool: Pool, files: Sequence[InputFile]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Every place that was read, in order (see `Read`), and what could not be read."""
    numbers = {file.name: k for k, file in enumerate(files)}
    number = pl.col("file").replace_strict(numbers, return_dtype=pl.Int32)
    found, bad = [], set()
    for bucket in range(pool.buckets):
        found.append(_frame(pool, PROVENANCE, bucket, ["id", "file", "line"]))
        bad.update(_frame(pool, REJECTED, bucket, ["id"])["id"].to_list())
    read = pl.concat(found).with_columns(number)
    # The chosen half of a pair is judged. What has a bad response alone is a row nobody judges.
    judged = pl.when(~pl.col("id").is_in(list(bad))).then("id").alias("id")
    read = read.with_columns(judged).sort("file", "line", "id", nulls_last=True)
    read = read.unique(["file", "line"], keep="first", maintain_order=True)
    read = read.with_columns(outcome=pl.lit(KEPT))
    unread = _frame(pool, QUARANTINE, 0, ["file", "line", "reason", "excerpt"])
    lost = unread.select(number, "line", "reason", outcome=pl.lit(UNREAD))
    lost = lost.unique(["file", "line"], keep="first", maintain_order=True)
    lost = lost.join(read, on=["file", "line"], how="anti")  # a pair of which one half is a row
    return pl.concat([read, lost], how="diagonal").sort("file", "line"), unread


def _without_copies(lines: pl.DataFrame) -> pl.DataFrame:
    """Identical rows are one row of the pool: the first of them stays where it does."""
    again = pl.col("id").is_not_null() & ~pl.col("id").is_first_distinct()
    twin = again & (pl.col("outcome") == KEPT)
    changed = {
        "outcome": pl.lit(REMOVED),
        "reason": pl.lit("exact_duplicate"),
        "value": pl.lit(1.0),
        "threshold": pl.lit(1.0),
        "matched_id": pl.col("id"),
    }
    return lines.with_columns(
        pl.when(twin).then(value).otherwise(name).alias(name) for name, value in changed.items()
    )


def _with_matched(lines: pl.DataFrame, compared: pl.DataFrame) -> pl.DataFrame:
    """Columns of `LINES`: adds the place of the row that each was removed for."""
    known = compared.with_row_index("matched").filter(pl.col("id").is_not_null())
    first = known.unique("id", keep="first", maintain_order=True)
    where = first.select(pl.col("id").alias("matched_id"), "matched")
    lines = lines.join(where, on="matched_id", how="left", maintain_order="left")
    return lines.select(pl.col(name).cast(kind) for name, kind in LINES.items())
