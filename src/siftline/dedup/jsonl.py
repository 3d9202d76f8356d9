"""JSON lines as Parquet: one schema over all files.

Inside a file polars finds the types. Between files, a column that is null or missing in one has the
type it has elsewhere, whole numbers beside fractions become floats where that changes none of them,
and objects get the keys of all. Anything else is refused with both files and the column.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

_EXACT = 2**53
"""Whole numbers up to here are floats, too."""


def schemas_of(sources: Sequence[Path]) -> list[pl.Schema]:
    """The columns of each file. All rows are read for their types, so no late column is lost.

    Raises:
        ValueError: if a file holds anything but JSON lines that make a table.
    """
    found = []
    for source in sources:
        if source.stat().st_size == 0:
            raise ValueError(f"{source} is empty: leave it out")
        try:
            schema = pl.scan_ndjson(source, infer_schema_length=None).collect_schema()
        except pl.exceptions.PolarsError as error:
            raise _refused(source, error) from error
        found.append(schema)
    return found


def one_schema(sources: Sequence[Path], schemas: Sequence[pl.Schema]) -> pl.Schema:
    """The schema that holds the rows of all files; columns in the order they first occur.

    Raises:
        ValueError: if two files disagree, whole numbers are too large to become floats, or a type
            fits no table.
    """
    joined: dict[str, tuple[Any, Path]] = {}
    for source, schema in zip(sources, schemas, strict=True):
        for name, kind in schema.items():
            known, first = joined.get(name, (pl.Null(), source))
            both = _join(known, kind, f"{first} and {source} differ in column", name)
            # Blame the file that gave the type what it is now.
            joined[name] = (both, source if both != known else first)
    for name, (kind, source) in joined.items():
        _check(source, name, kind)
    target = pl.Schema({name: kind for name, (kind, _) in joined.items()})
    for source, schema in zip(sources, schemas, strict=True):
        _check_floats(source, schema, target)
    return target


def to_parquet(source: Path, target: Path, schema: pl.Schema) -> None:
    """Writes a file as Parquet.

    Raises:
        ValueError: if its lines are no JSON, or hold what the schema does not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        pl.scan_ndjson(source, schema=schema).sink_parquet(target, compression="lz4")
    except pl.exceptions.PolarsError as error:
        raise _refused(source, error) from error


def _refused(source: Path, error: Exception) -> ValueError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{source} is not JSON lines that fit one table ({said}): correct the line, or convert it "
        "to Parquet"
    )


def _check(source: Path, name: str, kind: Any) -> None:
    """Refuses what Parquet, or a reader of it, cannot hold."""
    if isinstance(kind, pl.Struct):
        if not kind.fields:
            raise ValueError(
                f"{source} has a column of empty objects alone ({name}), which no table can hold: "
                "drop it"
            )
        for part in kind.fields:
            _check(source, f"{name}.{part.name}", part.dtype)
    elif isinstance(kind, pl.List):
        _check(source, f"{name}[]", kind.inner)
    elif kind == pl.Int128:
        raise ValueError(
            f"{source} has whole numbers of more than 64 bits in column {name!r}: write them as "
            "text"
        )


def _join(left: Any, right: Any, where: str, name: str) -> Any:
    """The type that holds values of both."""
    if left == right or right == pl.Null:
        return left
    if left == pl.Null:
        return right
    if isinstance(left, pl.Struct) and isinstance(right, pl.Struct):
        parts = {part.name: part.dtype for part in left.fields}
        for part in right.fields:
            known = parts.get(part.name, pl.Null())
            parts[part.name] = _join(known, part.dtype, where, f"{name}.{part.name}")
        return pl.Struct(parts)
    if isinstance(left, pl.List) and isinstance(right, pl.List):
        return pl.List(_join(left.inner, right.inner, where, f"{name}[]"))
    if {left, right} == {pl.Int64(), pl.Float64()}:
        return pl.Float64()
    raise ValueError(
        f"{where} {name!r}: {_said(left)} in one and {_said(right)} in the other; write one kind"
    )


def _said(kind: Any) -> str:
    if isinstance(kind, pl.Struct):
        return "objects"
    if isinstance(kind, pl.List):
        return "lists"
    names = {pl.String(): "text", pl.Int64(): "numbers", pl.Float64(): "numbers"}
    more = {pl.Int128(): "numbers of more than 64 bits", pl.Boolean(): "true and false"}
    return {**names, **more}.get(kind, str(kind))


def _check_floats(source: Path, schema: pl.Schema, target: pl.Schema) -> None:
    """Refuses whole numbers of a file that floats would change."""
    tests = [
        part.alias(f"{name} {k}")
        for name, kind in schema.items()
        for k, part in enumerate(_too_large(pl.col(name), kind, target[name]))
    ]
    if not tests:
        return
    (found,) = pl.scan_ndjson(source, schema=schema).select(tests).collect().to_dicts()
    for name, value in found.items():
        if value:
            raise ValueError(
                f"{source} has whole numbers above 2^53 in column {name.rpartition(' ')[0]!r}, "
                "which holds fractions in another file: write them as text"
            )


def _too_large(values: pl.Expr, kind: Any, target: Any) -> list[pl.Expr]:
    """Whether a float changes any value, for each part whole in `kind` and not in `target`."""
    if kind == pl.Int64 and target == pl.Float64:
        return [(values.max() > _EXACT) | (values.min() < -_EXACT)]
    if isinstance(kind, pl.List):
        return _too_large(values.explode(), kind.inner, target.inner)
    if isinstance(kind, pl.Struct):
        wanted = {part.name: part.dtype for part in target.fields}
        return [
            found
            for part in kind.fields
            for found in _too_large(values.struct.field(part.name), part.dtype, wanted[part.name])
        ]
    return []
