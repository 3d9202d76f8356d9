"""Columns that methods read about the rows of plain files: numbers, vectors, words."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.ingest.files import input_files
from siftline.ingest.pool import PROVENANCE, Pool
from siftline.ingest.readers import Source
from siftline.progress import Tracker
from siftline.rows.published import confirm_inputs
from siftline.rows.schema import ROW, text_view
from siftline.stages.select.run import narrow, whole_text

SCORES = "scores.parquet"
CHUNK = 1024
PART_VALUES = 1 << 26
"""Values of a part of the vectors that is read at once: 128 MB at float16."""
MakeTracker = Callable[[str, int, str], Tracker]


def row_columns(pool: Pool, bucket: int, *, text: bool) -> pl.DataFrame:
    """`id`, `prompt_id`, `source`, words and characters of the response, and `text` if asked."""
    return narrow(pool.rows(bucket, ROW.names), text=text)


def read_scores(folder: Path) -> pl.DataFrame:
    """Numeric columns of a score table, one line an id; response tokens are called `n_tokens`.

    Raises:
        ValueError: if there is no such table.
    """
    path = folder / SCORES if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"{path} is not there: give --scores the folder of siftline score")
    confirm_inputs([path])
    table = pl.read_parquet(path)
    if "id" not in table.columns:
        raise ValueError(f"{path} has no id column: give --scores the folder of siftline score")
    numeric = [name for name, kind in table.schema.items() if kind.is_numeric() and name != "row"]
    table = table.filter(pl.col("id").is_not_null()).select("id", *numeric)
    if "n_response_tokens" in numeric:
        tokens = pl.col("n_response_tokens").cast(pl.Int64)
        table = table.with_columns(tokens.alias("n_tokens")).drop("n_response_tokens")
    return table.unique("id", keep="first", maintain_order=True)


def leftover_numbers(pool: Pool, bucket: int, names: Sequence[str]) -> pl.DataFrame:
    """Numbers among the input's own columns that no field of a row used, by id; null for none."""
    places = _frame(pool, bucket, ["id", "file", "line", "leftover"])
    found: dict[str, list[float | None]] = {}
    for identity, text in places.select("id", "leftover").iter_rows():
        held = json.loads(text) if text else {}
        line = [_number(held.get(name)) for name in names]
        before = found.setdefault(identity, line)
        found[identity] = [a if a is not None else b for a, b in zip(before, line, strict=True)]
    columns = {name: [line[i] for line in found.values()] for i, name in enumerate(names)}
    schema = {"id": pl.String, **dict.fromkeys(names, pl.Float64)}
    return pl.DataFrame({"id": list(found), **columns}, schema=schema)


def _number(value: Any) -> float | None:
    if isinstance(value, str):  # CSV has no numbers
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _frame(pool: Pool, bucket: int, columns: list[str]) -> pl.DataFrame:
    frame = pl.from_arrow(pool.read(PROVENANCE, bucket, columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


@dataclass(frozen=True)
class Embeddings:
    """Vectors by row id, by place, or both.

    Attributes:
        by_id: `id`, `embedding`.
        by_place: `file`, `row`, `embedding`.
    """

    by_id: pl.DataFrame
    by_place: pl.DataFrame | None = None

    def joined(self, rows: pl.DataFrame, pool: Pool, bucket: int) -> pl.DataFrame:
        """The rows with their `embedding`, null where there is none."""
        found = self.by_id
        if self.by_place is not None:
            places = _frame(pool, bucket, ["id", "file", "line"]).rename({"line": "row"})
            placed = places.join(self.by_place, on=["file", "row"]).select("id", "embedding")
            found = pl.concat([found.join(rows, on="id", how="semi"), placed])
            found = found.unique("id", keep="first", maintain_order=True)
        return rows.join(found, on="id", how="left")

    def check_apart(self, pool: Sequence[Source], target: Sequence[Source]) -> None:
        """Refuses places that could be of a file of the pool and of another of the target.

        Both sets name their files for themselves, so two files may have one name.

        Raises:
            ValueError: naming the first such file.
        """
        if self.by_place is None:
            return
        keyed = set(self.by_place["file"].unique().to_list())
        ours = {file.name: file.parts for file in input_files(pool)}
        for file in input_files(target) if target else []:
            if file.name in keyed and ours.get(file.name, file.parts) != file.parts:
                raise ValueError(
                    f"embeddings are keyed by file and row, and {file.name} is a file of FILE and "
                    "another one of --target: key them by id, or rename one of the files"
                )


class Parts:
    """Vectors by id in Parquet files, read part by part.

    Attributes:
        paths: The files.
        column: Their column of vectors.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths, self.column = tuple(paths), column

    def __iter__(self) -> Iterator[pl.DataFrame]:
        """Frames of `id` and `embedding`, of 64 million values at most."""
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                width = file.schema_arrow.field(self.column).type.list_size
                rows = max(1, PART_VALUES // max(1, width))
                for batch in file.iter_batches(rows, columns=["id", self.column]):
                    frame = pl.DataFrame(pl.from_arrow(batch)).rename({self.column: "embedding"})
                    yield frame.filter(pl.col("embedding").is_not_null())

    def of(self, ids: pl.Series, folder: Path) -> Embeddings:
        """The vectors of a few rows.

        Raises:
            ValueError: if one has two that differ.
        """
        wanted = pl.DataFrame({"id": ids})
        found = pl.concat([part.join(wanted, on="id", how="semi") for part in self])
        return Embeddings(_single(found, ["id"], folder))

    def scored(
        self, ids: pl.Series, score: Callable[[pl.DataFrame], pl.DataFrame], folder: Path
    ) -> pl.DataFrame:
        """What a function gives for the vectors of some rows, one line for each that has one.

        Args:
            ids: The rows.
            score: Takes `id` and `embedding`, gives `id` and narrow columns.
            folder: Where the files lie, for errors.

        Raises:
            ValueError: if a row has two vectors of which it gives other numbers.
        """
        wanted = pl.DataFrame({"id": ids})
        found = pl.concat([score(part.join(wanted, on="id", how="semi")) for part in self])
        found = found.unique(maintain_order=True)
        twice = found.filter(pl.col("id").is_duplicated())
        if not twice.is_empty():
            raise ValueError(
                f"{folder} has two embeddings of id {twice['id'].sort()[0]} that differ: leave the "
                "files of one model"
            )
        return found


def parts_of(folder: Path, column: str) -> Parts | None:
    """The files of a folder as parts, where all of them have ids and vectors of one fixed width.

    That is what `siftline score --gradients` writes; others are read whole, by `read_embeddings`.
    """
    schemas = {path: pq.read_schema(path) for path in _files(folder)}
    used = {path: schema for path, schema in schemas.items() if column in schema.names}
    kinds = [schema.field(column).type for schema in used.values()]
    plain = all(
        pa.types.is_fixed_size_list(kind) and kind.value_type in (pa.float16(), pa.float32())
        for kind in kinds
    )
    keyed = all("id" in schema.names for schema in used.values())
    return Parts(list(used), column) if used and plain and keyed else None


def _files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    return [path for path in paths if path.is_file()]


def read_embeddings(folder: Path, column: str) -> Embeddings:
    """Reads the Parquet files of a folder (not below it) that have the column.

    Raises:
        ValueError: if none has it, rows can't be told, vectors are of several widths, or one row
            has two that differ.
    """
    confirm_inputs(_files(folder))
    names = {path: pq.read_schema(path).names for path in _files(folder)}
    used = [path for path in names if column in names[path]]
    if not used:
        seen = ", ".join(sorted({name for held in names.values() for name in held})) or "nothing"
        raise ValueError(
            f"no Parquet file in {folder} has the column {column!r} (seen: {seen}): name it with "
            "--embedding-column"
        )
    by_id, by_place = [], []
    for path in used:
        if "id" in names[path]:
            by_id.append(_vectors(path, ["id"], column))
        elif {"file", "row"} <= set(names[path]):
            by_place.append(_vectors(path, ["file", "row"], column))
            if (by_place[-1]["row"] < 1).any():
                raise ValueError(f"{path} has a row 0: rows count from 1, as in scores.parquet")
        else:
            raise ValueError(f"{path} has neither id nor file and row: its rows can't be told")
    kinds = {str(frame.schema["embedding"]): frame for frame in (*by_id, *by_place)}
    if len(kinds) > 1:
        raise ValueError(
            f"embeddings in {folder} are of several kinds ({', '.join(sorted(kinds))}): embed all "
            "rows with one model"
        )
    kind = next(iter(kinds.values())).schema["embedding"]
    empty = pl.DataFrame(schema={"id": pl.String, "embedding": kind})
    found = _single(pl.concat([empty, *by_id]), ["id"], folder)
    return Embeddings(
        found, _single(pl.concat(by_place), ["file", "row"], folder) if by_place else None
    )


def _single(frame: pl.DataFrame, keys: list[str], folder: Path) -> pl.DataFrame:
    """Each row's vector once.

    Raises:
        ValueError: if a row has two that differ.
    """
    again = frame.filter(pl.struct(keys).is_duplicated())
    if again.is_empty():
        return frame
    bits = [v.tobytes() for v in again["embedding"].to_numpy()]
    lines = again.select(keys).with_columns(pl.Series("bits", bits, dtype=pl.Binary)).unique()
    twice = lines.filter(pl.struct(keys).is_duplicated()).sort(keys)
    if not twice.is_empty():
        first = ", ".join(f"{name} {twice[name][0]}" for name in keys)
        raise ValueError(
            f"{folder} has two embeddings of {first} that differ: leave the files of one model"
        )
    return frame.unique(keys, keep="first", maintain_order=True)


def _vectors(path: Path, keys: list[str], column: str) -> pl.DataFrame:
    frame = pl.read_parquet(path, columns=[*keys, column]).rename({column: "embedding"})
    frame = frame.filter(pl.col("embedding").is_not_null())
    kind = frame.schema["embedding"]
    if isinstance(kind, pl.List):
        widths = frame["embedding"].list.len().unique().sort().to_list()
        if len(widths) > 1:
            raise ValueError(
                f"{path}: embeddings have {widths[0]} to {widths[-1]} dimensions: embed all rows "
                "with one model"
            )
        width = widths[0] if widths else 0
    elif isinstance(kind, pl.Array):
        width = kind.shape[0]
    else:
        raise ValueError(f"{path}: {column} holds {kind}: store lists of float16 or float32")
    inner = pl.Float16 if kind.inner == pl.Float16 else pl.Float32
    keyed = [pl.col("row").cast(pl.Int64)] if "row" in keys else []
    return frame.with_columns(pl.col("embedding").cast(pl.Array(inner, width)), *keyed)


def embedded(
    model: str, pools: Sequence[Pool], make_tracker: MakeTracker, *, conversations: bool = False
) -> Embeddings:
    """Embeds every row, float16, with the model in a directory.

    Args:
        model: The directory.
        pools: The rows.
        make_tracker: Makes what tells progress.
        conversations: Whether a row is its conversation with roles, as its model templates it, or
            the text of prompt and response. A row that can't be templated has no vector.
    """
    from siftline.scoring.engines.base import ModelSpec, check_directory
    from siftline.scoring.measures.embed import open_embedder

    spec = ModelSpec(model)
    if (check_directory(spec) / "modules.json").exists():
        spec = ModelSpec(model, engine="sentence-transformers")
    total = sum(pool.manifest.rows("rows") for pool in pools)
    embedder = open_embedder(spec)
    tracker = make_tracker("embed", total, "rows")
    names: list[str] = []
    vectors: list[np.ndarray] = []
    try:
        for pool in pools:
            for bucket in range(pool.buckets):
                table = pool.rows(bucket, ROW.names)
                for part in table.to_batches(CHUNK) if conversations else ():
                    found, _ = embedder.embed_conversations(part.to_pylist())
                    vectors += [np.stack(list(found.values())).astype("<f2")] if found else []
                    names += found
                    tracker.advance(part.num_rows)
                view = text_view(table if not conversations else table[:0])
                view = view.select("id", whole_text())
                for chunk in view.iter_slices(CHUNK):
                    vectors.append(embedder.embed_texts(chunk["prompt"].to_list()).astype("<f2"))
                    names += chunk["id"].to_list()
                    tracker.advance(chunk.height)
    finally:
        tracker.close()
        embedder.close()
    if not vectors:
        raise ValueError(f"{model}: its chat template can write none of the {total} rows")
    matrix = np.concatenate(vectors)
    column = pl.Series("embedding", matrix, dtype=pl.Array(pl.Float16, matrix.shape[1]))
    frame = pl.DataFrame({"id": names}).with_columns(column)
    return Embeddings(frame.unique("id", keep="first", maintain_order=True))
