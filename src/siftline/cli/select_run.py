"""One selection over plain files, from the files to the folder.

What it leaves says why every row stayed or went, beside the records kept.
"""

import csv
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from siftline.cli.rule_tables import read_rule
from siftline.cli.select_columns import (
    Embeddings,
    Parts,
    embedded,
    leftover_numbers,
    parts_of,
    read_embeddings,
    read_scores,
    row_columns,
)
from siftline.config import build, override
from siftline.deduplication.arrow import without_views
from siftline.ingest.files import InputFile, input_files
from siftline.ingest.pool import PROVENANCE, QUARANTINE, REJECTED, Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source, source_files
from siftline.ingest.records import EmptyFile, Record, batches_of, read_records
from siftline.progress import Tracker
from siftline.rows.published import record_outputs
from siftline.rows.shards import building, write_json, write_parquet
from siftline.selectors.method import RANKS
from siftline.selectors.registry import Entry, find
from siftline.selectors.rounds import RECIPES_ONLY
from siftline.selectors.spending import Budget
from siftline.stages.select.options import LIKELIHOODS

SELECTION, DATA = "selection.parquet", "data"
IDENTICAL = "identical_row"
"""Reason of a row that another, kept or removed by the method, is identical to."""
_LINES = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("rank", pa.int64()),
        pa.field("lost_to", pa.string()),
    ]
)


def write_selection(pool: Pool, decided: pl.DataFrame, path: Path) -> dict[str, Any]:
    """Writes one line for every place a row was read from, sorted by file and row.

    Of identical rows the first place carries the decision. What could not be read is there as well,
    without an id.

    Returns:
        `rows`, `kept`, and `removed`: counts by reason.
    """
    places = pl.concat([_frame(pool, PROVENANCE, b) for b in range(pool.buckets)])
    lines = places.select("id", "file", pl.col("line").alias("row")).sort("file", "row", "id")
    lines = lines.join(decided.rename({"matched_id": "lost_to"}), on="id", how="left")
    assert lines["kept"].null_count() == 0, "a row that was not decided"
    again = lines["id"].is_first_distinct().not_()
    lines = lines.with_columns(
        pl.when(again).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("value", "rank", "lost_to")
    ).with_columns(
        kept=pl.col("kept") & ~again,
        reason=pl.when(again).then(pl.lit(IDENTICAL)).otherwise(pl.col("reason")),
    )
    unread = _frame(pool, QUARANTINE, 0).select("file", pl.col("line").alias("row"), "reason")
    lines = pl.concat([lines, unread.with_columns(kept=pl.lit(False))], how="diagonal")
    lines = lines.sort("file", "row", "id").select(_LINES.names)
    write_parquet(lines.to_arrow().cast(_LINES), path)
    tally = lines.filter(~pl.col("kept"))["reason"].value_counts().sort("reason")
    removed = dict(tally.iter_rows())
    return {"rows": lines.height, "kept": int(lines["kept"].sum()), "removed": removed}


def _frame(pool: Pool, table: str, bucket: int) -> pl.DataFrame:
    columns = ["id", "file", "line"] if table == PROVENANCE else ["file", "line", "reason"]
    frame = pl.from_arrow(pool.read(table, bucket, columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def write_data(sources: Sequence[Source], selection: Path, folder: Path) -> None:
    """Writes the kept records of each input file to a file of its own, all their columns kept.

    JSONL and JSON become JSONL, CSV stays CSV with its header, the binary formats become Parquet
    with their schema. Records come in the order they had.
    """
    folder.mkdir()
    kept = pl.read_parquet(selection, columns=["file", "row", "kept"]).filter("kept")
    for file in input_files(sources):
        rows = set(kept.filter(file=file.name)["row"].to_list())
        if rows:
            ending, write = _WRITERS[file.format]
            path = folder / f"{_flat(file.name)}{ending}"
            if path.exists():  # a.json beside a.jsonl
                path = folder / f"{file.name.replace('/', '__').replace('.', '_')}{ending}"
            write(file, rows, path)


def _flat(name: str) -> str:
    """A file's name without its endings, folders joined by two underscores."""
    base = name.replace("/", "__")
    for ending in (".gz", ".zst"):
        base = base.removesuffix(ending)
    stem, dot, _ = base.rpartition(".")
    return stem if dot and stem else base


def _kept(file: InputFile, rows: set[int]) -> Iterator[dict[str, Any]]:
    for item in read_records(file):
        if isinstance(item, Record) and item.line in rows:
            yield item.value


def _write_jsonl(file: InputFile, rows: set[int], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for record in _kept(file, rows):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(file: InputFile, rows: set[int], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for record in _kept(file, rows):
            if writer is None:
                writer = csv.DictWriter(stream, list(record), lineterminator="\n")
                writer.writeheader()
            writer.writerow(record)


def _write_parquet(file: InputFile, rows: set[int], path: Path) -> None:
    parts, start = [], 1
    for batch in batches_of(file):
        marks = pa.array([start + i in rows for i in range(batch.num_rows)], pa.bool_())
        plain = without_views(batch)
        if plain.schema.equals(batch.schema):
            parts.append(pa.Table.from_batches([batch]).filter(marks))
        else:  # Arrow can't filter views
            parts.append(pa.Table.from_batches([plain]).filter(marks).cast(batch.schema))
        start += batch.num_rows
    write_parquet(pa.concat_tables(parts), path)


_WRITERS: dict[str, tuple[str, Callable[[InputFile, set[int], Path], None]]] = {
    "jsonl": (".jsonl", _write_jsonl),
    "json": (".jsonl", _write_jsonl),
    "csv": (".csv", _write_csv),
    "parquet": (".parquet", _write_parquet),
    "arrow": (".parquet", _write_parquet),
    "datasets": (".parquet", _write_parquet),
}


BUCKETS = 16
MakeTracker = Callable[[str, int, str], Tracker]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is asked for; see the options of `siftline select`."""

    method: str
    sources: tuple[Source, ...]
    targets: tuple[Source, ...]
    budget: int
    unit: Literal["rows", "loss_tokens"] = "rows"
    on_shortfall: Literal["error", "smaller"] = "error"
    on_missing: Literal["error", "drop"] = "error"
    scores: Path | None = None
    embeddings: Path | None = None
    embedding_column: str = "embedding"
    embedder: str | None = None
    rule: Path | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()


def select_files(
    request: Request, out: Path, make_tracker: MakeTracker, say: Say
) -> dict[str, Any]:
    """Selects rows and writes the folder `out`, which appears whole or not at all.

    Returns:
        Paths, counts by reason, the method with its options, and its facts. JSON.

    Raises:
        ValueError: if something that the method needs is not there, or the budget can't be met.
        FileExistsError: if `out` exists.
    """
    entry = find(request.method)
    method = configured(entry, request)
    budget = Budget(request.budget, request.unit, request.on_shortfall)
    _check(entry, request)
    for source in (*request.sources, *request.targets):
        source_files(source)
    with building(out) as folder:
        scratch = folder / ".rows"
        read = _own_numbers(entry, method, request)
        pool = _ingested(scratch / "pool", request.sources, make_tracker, read=read)
        target = _ingested(scratch / "target", request.targets, make_tracker, "target")
        offered = _Offered(entry, method, request, pool, target, folder, make_tracker)
        if entry.own and pool.manifest.rows("rows") > entry.limit:
            raise ValueError(
                f"{pool.manifest.rows('rows')} rows, and {entry.name} takes {entry.limit} at most: "
                "draw a part with random first"
            )
        decided, facts, options = _decided(offered, method, budget, say)
        decided = pl.concat([decided, _labelled_bad(pool)], how="diagonal")
        counts = write_selection(pool, decided, folder / SELECTION)
        write_data(request.sources, folder / SELECTION, folder / DATA)
        seed = options.get("seed", request.seed)
        result = {"method": entry.name, "options": options, "seed": seed}
        result |= {"budget": asdict(budget), **counts, **pool.reading(read), "facts": facts}
        write_json(folder / "selection.json", result)
        shutil.rmtree(scratch)
        record_outputs(folder)
    return {"selection": str(out / SELECTION), "data": str(out / DATA), **result}


def _labelled_bad(pool: Pool) -> pl.DataFrame:
    """Decisions about the rows whose response is labelled a bad one: nothing to select."""
    parts = [
        pl.DataFrame(pl.from_arrow(pool.read(REJECTED, b, ["id"]))) for b in range(pool.buckets)
    ]
    return pl.concat(parts).with_columns(kept=pl.lit(False), reason=pl.lit("labelled_bad"))


def configured(entry: Entry, request: Request) -> Any:
    """The method with its options: of a fitted rule, by --set, and the seed where it has one."""
    data: dict[str, Any] = {}
    if request.rule is not None:
        if entry.name != "linear_rule":
            raise ValueError(f"--rule is for linear_rule, and {entry.name} has none: leave it out")
        data = read_rule(request.rule)
    for assignment in request.overrides:
        override(data, assignment)
    made = build(entry.method, data, entry.name)
    seeded = "seed" in {field.name for field in fields(entry.method)} and "seed" not in data
    return replace(made, seed=request.seed) if seeded else made


def _check(entry: Entry, request: Request) -> None:
    """Refuses what can be told before any file is read."""
    if "training" in entry.needs:
        raise ValueError(RECIPES_ONLY)
    if "gradients" in entry.needs and request.embeddings is None:
        raise ValueError(
            f"{entry.name} needs gradient features: make them with siftline score --gradients, "
            "and give its folder as --embeddings DIR"
        )
    wants = "embeddings" in entry.needs and not entry.own
    if wants and request.embeddings is None and request.embedder is None:
        raise ValueError(
            f"{entry.name} needs embeddings: give --embeddings DIR, or --embedder MODEL_DIR"
        )
    if request.embeddings is not None and request.embedder is not None:
        raise ValueError("--embeddings and --embedder exclude each other: give one of them")
    if "target warm-up" in entry.needs:
        # The columns are given, and with them what the model was warmed up on.
        if request.targets:
            raise ValueError(
                f"{entry.name} reads likelihoods under a model that was trained on the target: "
                "leave --target out, or use a recipe, whose stage trains it"
            )
    elif entry.targeted and not request.targets:
        raise ValueError(f"{entry.name} selects towards a target: give --target FILE")
    if request.targets and not entry.targeted and not entry.own:
        raise ValueError(f"{entry.name} knows no target: leave --target out, or see --list")


def _ingested(
    folder: Path,
    sources: Sequence[Source],
    make_tracker: MakeTracker,
    name: str = "input",
    read: Collection[str] = (),
) -> Pool | Any:
    if not sources:
        return None
    tracker = make_tracker(f"read {name}", 0, "rows")
    try:
        spec = PoolSpec(name, tuple(sources), BUCKETS, 1.0)
        build_pool(folder, spec, tracker.advance, read=read)
    except EmptyFile as error:
        if name != "target":
            raise
        raise ValueError(
            f"{error.path}: empty, and a target needs rows: give rows like those that are wanted"
        ) from error
    finally:
        tracker.close()
    return Pool(folder)


class _Offered:
    """What a method is given: frames of the pool by bucket, and one of the target."""

    def __init__(
        self,
        entry: Entry,
        method: Any,
        request: Request,
        pool: Pool,
        target: Pool | None,
        folder: Path,
        make_tracker: MakeTracker,
    ) -> None:
        self.entry, self.request, self.pool, self.target = entry, request, pool, target
        self.numbers = _needed(entry, method, request)
        self.scores = None if request.scores is None else read_scores(request.scores)
        self.missing: dict[str, str] = {}
        self.scored: pl.DataFrame | None = None
        parts = None
        if target is not None and request.embeddings is not None and hasattr(method, "score"):
            parts = parts_of(request.embeddings, request.embedding_column)
        if parts is None:
            self.vectors = self._vectors(folder, make_tracker)
        else:
            self._score(method, parts)

    def _score(self, method: Any, parts: Parts) -> None:
        """Has the pool scored part by part, so that only the target's vectors are held."""
        assert self.target is not None
        assert self.request.embeddings is not None
        self.vectors = parts.of(_ids(self.target), self.request.embeddings)
        target = self.target_frame()
        self.scored = parts.scored(
            _ids(self.pool), lambda part: method.score(part, target), self.request.embeddings
        )

    def _vectors(self, folder: Path, make_tracker: MakeTracker) -> Embeddings | None:
        if not {"embeddings", "target embeddings", "gradients"} & set(self.entry.needs):
            return None
        if self.request.embedder is not None:
            pools = [pool for pool in (self.pool, self.target) if pool is not None]
            found = embedded(
                self.request.embedder,
                pools,
                make_tracker,
                conversations=self.entry.conversations,
            )
            write_parquet(found.by_id.to_arrow(), folder / "embeddings.parquet")
            return found
        if self.request.embeddings is None:
            return None
        found = read_embeddings(self.request.embeddings, self.request.embedding_column)
        found.check_apart(self.request.sources, self.request.targets)
        return found

    def frame(self, bucket: int) -> pl.DataFrame:
        """One bucket of the pool without the rows that lack something, which are noted."""
        rows = row_columns(self.pool, bucket, text="text" in self.entry.needs)
        needed = list(self.numbers)
        if self.scores is not None:
            taken = [name for name in self.scores.columns if name not in rows.columns]
            rows = rows.join(self.scores.select("id", *taken), on="id", how="left")
        absent = [name for name in needed if name not in rows.columns]
        if absent:
            own = leftover_numbers(self.pool, bucket, absent)
            rows = rows.join(own, on="id", how="left")
        if self.scored is not None:
            narrow = self.scored.columns[1:]
            rows = rows.drop(narrow, strict=False).join(self.scored, on="id", how="left")
            rows = self._complete(rows, needed)
            return self._complete(rows.rename({narrow[0]: "embedding"}), ["embedding"]).rename(
                {"embedding": narrow[0]}
            )
        if self.vectors is not None:
            rows = self.vectors.joined(rows, self.pool, bucket)
            needed.append("embedding")
        return self._complete(rows, needed)

    def state(self, method: Any, rows: pl.DataFrame) -> Any:
        """What the method's decision needs of a bucket."""
        if self.scored is None:
            return method.summarise(rows)
        return rows.select(*self.scored.columns, *(["n_tokens"] if "n_tokens" in rows else []))

    def _complete(self, rows: pl.DataFrame, needed: Sequence[str]) -> pl.DataFrame:
        for name in needed:
            lacks = pl.col(name).is_null()
            if rows.schema[name].is_float():
                lacks = lacks | ~pl.col(name).is_finite()
            lost = rows.filter(lacks)
            what = "no_embedding" if name == "embedding" else "no_score"
            self.missing |= dict.fromkeys(lost["id"].to_list(), what)
            if lost.height and self.request.on_missing == "error":
                raise ValueError(self._lacking(name, lost))
            rows = rows.filter(~lacks)
        return rows

    def _lacking(self, name: str, lost: pl.DataFrame) -> str:
        if name == "embedding" and "gradients" in self.entry.needs:
            remedy = "run siftline score --gradients on these files (its failed.parquet says why)"
        elif name == "embedding":
            remedy = "embed them too, or use --embedder"
        elif self.request.scores is not None and name in LIKELIHOODS:
            remedy = "run siftline score on these files"
        elif name in LIKELIHOODS:
            remedy = "give --scores DIR, as siftline score writes it"
        else:
            remedy = f"put a number {name!r} in every record or in the table of --scores"
        return (
            f"{lost.height} rows or more have no {name}, first {lost['id'][0]}: {remedy}; or leave "
            "such rows out with --on-missing drop"
        )

    def target_frame(self) -> pl.DataFrame | None:
        """The target's rows with their text and embeddings."""
        if self.target is None:
            return None
        parts = []
        for bucket in range(self.target.buckets):
            rows = row_columns(self.target, bucket, text=True)
            if self.vectors is not None:
                rows = self.vectors.joined(rows, self.target, bucket)
            parts.append(rows)
        rows = pl.concat(parts)
        if "embedding" in rows.columns and rows["embedding"].null_count():
            first = rows.filter(pl.col("embedding").is_null())["id"][0]
            remedy = "add them to --embeddings, or use --embedder"
            if "gradients" in self.entry.needs:
                remedy = "give siftline score --gradients the same --target"
            raise ValueError(
                f"{rows['embedding'].null_count()} target rows have no embedding, first {first}: "
                f"{remedy}"
            )
        return rows


def _ids(pool: Pool) -> pl.Series:
    parts = [pl.DataFrame(pl.from_arrow(pool.rows(b, ["id"]))) for b in range(pool.buckets)]
    return pl.concat(parts)["id"].unique()


def _needed(entry: Entry, method: Any, request: Request) -> tuple[str, ...]:
    """Numbers that every row must have."""
    always = ("n_words", "n_chars")
    columns = method.columns() if hasattr(method, "columns") else {}
    needed = {name for name in entry.needed_columns(method) if name not in always}
    if "n_tokens" in columns or request.unit == "loss_tokens":
        needed.add("n_tokens")
    return tuple(sorted(needed))


def _own_numbers(entry: Entry, method: Any, request: Request) -> frozenset[str]:
    """Columns of the input that the method reads, because no score table has them."""
    scored = () if request.scores is None else read_scores(request.scores).columns
    return frozenset(_needed(entry, method, request)) - set(scored)


def _decided(
    offered: _Offered, method: Any, budget: Budget, say: Say
) -> tuple[pl.DataFrame, Mapping[str, Any], Mapping[str, Any]]:
    """Decisions with ranks about every distinct row, the facts, the options in use."""
    target = offered.target_frame()
    ids: list[pl.Series] = []
    states = []
    prompts: set[str] = set()
    for bucket in range(offered.pool.buckets):
        rows = offered.frame(bucket)
        ids.append(rows["id"])
        prompts |= set(rows["prompt_id"])
        states.append(offered.state(method, rows))
    if target is not None:
        leaked = int(target["prompt_id"].is_in(prompts).sum())
        if leaked:
            say(f"the pool has the prompts of {leaked} of {target.height} target rows")
    plan = method.decide(states, budget, target)
    del states
    decided, facts = [], {}
    own = offered.entry.own
    for bucket, names in enumerate(ids):
        rows = offered.frame(bucket) if own else pl.DataFrame({"id": names})
        selection = method.apply(rows, plan)
        facts = selection.facts
        ranks = selection.tables.get(RANKS)
        if ranks is None:
            ranks = selection.decisions.select("id", pl.lit(None, pl.Int64).alias("rank"))
        decided.append(selection.decisions.join(ranks, on="id", how="left"))
    if facts.get("groups") == 1 and "source" in offered.entry.needs:
        say("all rows are of one source: name its column with --field source=COLUMN")
    lines = pl.concat(decided).select("id", "kept", "reason", "value", "rank", "matched_id")
    without = pl.DataFrame(
        {"id": list(offered.missing), "reason": list(offered.missing.values())},
        schema={"id": pl.String, "reason": pl.String},
    ).with_columns(kept=pl.lit(False))
    lines = pl.concat(
        [lines, without.filter(~pl.col("id").is_in(lines["id"].to_list()))], how="diagonal"
    )
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    return lines, facts, options
