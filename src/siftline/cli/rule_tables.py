"""Tables behind `siftline rule`: indicators of rows, means of runs, and the rule as a file."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from siftline.cli.score_tables import SCORES, ingested, places_of
from siftline.cli.select_columns import (
    Embeddings,
    embedded,
    read_embeddings,
    read_scores,
    row_columns,
)
from siftline.config import nearest
from siftline.ingest.pool import Pool
from siftline.ingest.readers import Source, source_files
from siftline.kernels.text.words import mtld
from siftline.kernels.text.words import mtld_words as words_of
from siftline.kernels.vectors.topk import kth_distances
from siftline.progress import Tracker
from siftline.rows.published import confirm_inputs, record_outputs
from siftline.rows.schema import ROW, text_view
from siftline.rows.shards import building, write_parquet
from siftline.selectors.linear_rule import fit_rule
from siftline.selectors.method import matrix

MakeTracker = Callable[[str, int, str], Tracker]


@dataclass(frozen=True)
class Asked:
    """What indicators are made of; see the options of `siftline rule indicators`."""

    sources: tuple[Source, ...]
    embeddings: Path | None = None
    embedding_column: str = "embedding"
    embedder: str | None = None
    neighbour: int = 6
    scores: Path | None = None


def write_indicators(asked: Asked, out: Path, make_tracker: MakeTracker) -> pl.DataFrame:
    """Computes the indicators of all rows and writes `out`, which appears whole or not at all.

    Returns:
        The table: id, file, row, and a column for each indicator, null where a row has none.

    Raises:
        ValueError: if a file is not there, or an indicator's name comes twice.
        FileExistsError: if `out` exists.
    """
    if asked.embeddings is not None and asked.embedder is not None:
        raise ValueError("--embeddings and --embedder exclude each other: give one of them")
    for source in asked.sources:
        source_files(source)
    scores = None if asked.scores is None else read_scores(asked.scores)
    with building(out) as folder:
        pool = ingested(folder / ".rows", asked.sources, make_tracker)
        vectors = None
        if asked.embedder is not None:
            vectors = embedded(asked.embedder, [pool], make_tracker)
            write_parquet(vectors.by_id.to_arrow(), folder / "embeddings.parquet")
        elif asked.embeddings is not None:
            vectors = read_embeddings(asked.embeddings, asked.embedding_column)
        rows = pl.concat([of_texts(pool, bucket) for bucket in range(pool.buckets)])
        if vectors is not None:
            apart = distances(pool, vectors, asked.neighbour, make_tracker)
            rows = rows.join(apart, on="id", how="left")
        if scores is not None:
            # n_words and n_chars of the text are the text's.
            taken = [name for name in scores.columns if name not in rows.columns]
            rows = rows.join(scores.select("id", *taken), on="id", how="left")
        places = pl.concat([places_of(pool, bucket) for bucket in range(pool.buckets)])
        table = places.join(rows, on="id").sort("file", "row", "id")
        write_parquet(table.to_arrow(), folder / SCORES)
        shutil.rmtree(folder / ".rows")
        record_outputs(folder)
    return table


def of_texts(pool: Pool, bucket: int) -> pl.DataFrame:
    """Indicators of the rows' own words, by id."""
    counts = row_columns(pool, bucket, text=False).select("id", "n_words", "n_chars")
    view = text_view(pool.rows(bucket, ROW.names))
    diverse = [mtld(words_of(text)) for text in view["response"].to_list()]
    words = view.select(
        "id",
        pl.col("prompt").str.count_matches(r"\S+").cast(pl.Int64).alias("n_prompt_words"),
        pl.Series("mtld", diverse, dtype=pl.Float64),
    )
    return counts.join(words, on="id")


def distances(
    pool: Pool, vectors: Embeddings, neighbour: int, make_tracker: MakeTracker
) -> pl.DataFrame:
    """Distance to a nearest neighbour among the rows that have an embedding, by id.

    Raises:
        ValueError: if too few rows have one, or as `matrix`.
    """
    names = [pl.from_arrow(pool.rows(b, ["id"])) for b in range(pool.buckets)]
    found = []
    for bucket, rows in enumerate(names):
        assert isinstance(rows, pl.DataFrame)
        found.append(vectors.joined(rows.unique("id"), pool, bucket))
    frame = pl.concat(found).filter(pl.col("embedding").is_not_null()).sort("id")
    tracker = make_tracker("neighbours", frame.height, "rows")
    try:
        values = kth_distances(matrix(frame), neighbour, tracker.advance)
    finally:
        tracker.close()
    return frame.select("id", pl.Series(f"knn_{neighbour}", values))


def read_runs(path: Path, names: Sequence[str]) -> pl.DataFrame:
    """A CSV or Parquet file of runs, some of its columns as float64.

    Raises:
        ValueError: if it is no such file, lacks a column, or a value is no number.
    """
    table = _table(path)
    for name in names:
        if name not in table.columns:
            raise ValueError(f"{path} has no column {name!r}: {nearest(name, table.columns)}")
    return _numeric(table, names, path)


def _table(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise ValueError(f"{path} is not there: give a CSV or Parquet file of runs")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} can't be read ({error}): give CSV or Parquet") from error


def _numeric(table: pl.DataFrame, names: Sequence[str], path: Path) -> pl.DataFrame:
    for name in dict.fromkeys(names):
        column = table[name]
        numbers = column.cast(pl.Float64, strict=False)
        bad = (~numbers.is_finite()).fill_null(value=True)
        if bad.any():
            place = int(bad.arg_max() or 0)
            raise ValueError(
                f"{path}: {name} of line {place + 1} is {column[place]!r}: give a number, or leave "
                "the run out"
            )
        table = table.with_columns(numbers.alias(name))
    return table


def with_means(path: Path, names: Sequence[str], scores: Path | None) -> pl.DataFrame:
    """Runs with the means of indicators over their sets.

    Args:
        path: The runs. Without `scores` it has the means as columns; with them a column `folder`,
            relative to the file's own folder or to where the command runs.
        names: The indicators.
        scores: Indicators of the rows.

    Raises:
        ValueError: as `read_runs`; if a folder holds no selection, or kept rows have no indicator.
    """
    if scores is None:
        return read_runs(path, names)
    table = _table(path)
    if "folder" not in table.columns:
        raise ValueError(
            f"{path} has no column 'folder': name the folder of siftline select that each run was "
            "tuned on, or leave --scores out and give the means"
        )
    known = read_scores(scores)
    for name in names:
        if name not in known.columns:
            raise ValueError(f"{scores} has no column {name!r}: {nearest(name, known.columns)}")
    means = [_means(path, folder, known, names) for folder in table["folder"].to_list()]
    return table.drop(names, strict=False).hstack(pl.concat(means))


def _means(path: Path, folder: str, known: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    places = [Path(folder) / "selection.parquet", path.parent / folder / "selection.parquet"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"{places[0]} is not there: give the folder of siftline select")
    confirm_inputs([found])
    kept = pl.read_parquet(found, columns=["id", "kept"]).filter("kept").select("id")
    rows = kept.join(known, on="id", how="left")
    for name in names:
        lost = int((~rows[name].is_finite()).fill_null(value=True).sum())
        if lost:
            raise ValueError(
                f"{lost} of the {rows.height} rows kept in {folder} have no {name}: compute it for "
                "all rows that runs were drawn from"
            )
    return rows.sort("id").select(pl.col(name).cast(pl.Float64).mean() for name in names)


def fitted(path: Path, names: Sequence[str], loss: str, scores: Path | None) -> dict[str, Any]:
    """A rule fitted to the runs in a file: its options, and whether to trust them. JSON.

    Raises:
        ValueError: as `with_means` and `fit_rule`.
    """
    if not names:
        raise ValueError("--indicators is empty: name one column or more")
    runs = with_means(path, names, scores)
    if loss in runs.columns:
        runs = _numeric(runs, [loss], path)
    rule, table, fit = fit_rule(runs, names, loss)
    return {
        "coefficients": rule.coefficients,
        "intercept": rule.intercept,
        "loss": loss,
        "runs": fit.observations,
        "r_squared": fit.r_squared,
        "table": table.to_dicts(),
    }


def read_rule(path: Path) -> dict[str, Any]:
    """Options of `linear_rule` from a file of `siftline rule fit`.

    Raises:
        ValueError: if it is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: give the file of siftline rule fit")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): give the file of siftline rule fit"
        ) from error
    if not isinstance(held, dict) or "coefficients" not in held:
        raise ValueError(f"{path} has no coefficients: give the file of siftline rule fit")
    return {name: held[name] for name in ("coefficients", "intercept") if name in held}
