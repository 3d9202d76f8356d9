"""`siftline explain`: the whole story of one row, wherever it ended.

A row is named by its id (or the first digits of it), or by the file and line it was read from,
which is the only name that a quarantined or collapsed input line has.
"""

import re
from collections.abc import Iterator
from typing import Any

import polars as pl

from siftline.ingest.pool import PROVENANCE, QUARANTINE, REJECTED, ROWS, Pool
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.rows.ledger import Chapter, StageOutput, stage_chapters
from siftline.rows.published import is_version, read_config, read_version
from siftline.rows.schema import bucket_of
from siftline.workspace import Workspace

SHORTEST = 8
"""Fewest digits of an id that are looked up: the bucket is read from them."""


def explain(
    workspace: Workspace, name: str, recipes: list[tuple[Recipe, list[tuple[Stage, StageOutput]]]]
) -> list[tuple[str, list[Chapter]]]:
    """Tells what happened to a row.

    Args:
        workspace: The root.
        name: An id, its first digits, or `file:line`.
        recipes: Recipes with the outputs of the stages that have run.

    Returns:
        (title, chapters) for every pool and recipe that knows the row.

    Raises:
        ValueError: if nothing knows it, or the digits fit several rows.
    """
    stories: list[tuple[str, list[Chapter]]] = []
    file, colon, line = name.rpartition(":")
    pools = sorted(workspace.root.glob("pool/*/manifest.json"))
    if colon and line.isdigit():
        for path in pools:
            stories += _by_line(workspace, path.parent.name, file, int(line), recipes)
    else:
        if not re.fullmatch(f"[0-9a-f]{{{SHORTEST},40}}", name):
            raise ValueError(
                f"{name!r} is no row id: give {SHORTEST} to 40 hex digits, or FILE:LINE"
            )
        for path in pools:
            stories += _by_id(workspace, path.parent.name, name, recipes)
        stories += _added(workspace, name, recipes)
    if not stories:
        raise ValueError(f"no pool or stage under {workspace.root} knows {name!r}")
    return stories


def _by_line(
    workspace: Workspace, title: str, file: str, line: int, recipes: list[Any]
) -> Iterator[tuple[str, list[Chapter]]]:
    pool = Pool(workspace.pool(title))
    here = (pl.col("file") == file) & (pl.col("line") == line)
    bad = _frame(pool.read(QUARANTINE, 0)).filter(here)
    for row in bad.to_dicts():
        detail = {k: row[k] for k in ("file", "line", "reason", "excerpt")}
        yield f"pool {title}", [Chapter("pool", "quarantined", detail)]
    for bucket in range(pool.buckets):
        found = _frame(pool.read(PROVENANCE, bucket)).filter(here)
        for identity in found["id"].to_list():
            yield from _by_id(workspace, title, identity, recipes)


def _by_id(
    workspace: Workspace, title: str, name: str, recipes: list[Any]
) -> Iterator[tuple[str, list[Chapter]]]:
    pool = Pool(workspace.pool(title))
    bucket = bucket_of(name.ljust(40, "0"), pool.buckets)
    columns = ["id", "copies", "source"]
    rows = _frame(pool.read(ROWS, bucket, columns))
    apart = _frame(pool.read(REJECTED, bucket, columns)).filter(pl.col("id").str.starts_with(name))
    found = rows.filter(pl.col("id").str.starts_with(name)).to_dicts()
    if len(found) > 1:
        raise ValueError(f"{name!r} fits {len(found)} rows of pool {title}: give more digits")
    for row in apart.to_dicts():
        detail = {"reason": "its response is labelled bad: for preference pairs only"}
        chapters = [*_origins(pool, bucket, row), Chapter("pool", "kept apart", detail)]
        yield f"pool {title}, row {row['id']}", chapters
    for row in found:
        chapters = list(_origins(pool, bucket, row))
        told = False
        for recipe, done in recipes:
            if recipe.pool.name != title:
                continue
            told = True
            later = list(_stages(row["id"], done, pool.buckets))
            later += _published(workspace, recipe, row["id"])
            yield f"recipe {recipe.name}, row {row['id']}", chapters + later
        if not told:
            yield f"pool {title}, row {row['id']}", chapters


def _origins(pool: Pool, bucket: int, row: dict[str, Any]) -> Iterator[Chapter]:
    lines = _frame(pool.read(PROVENANCE, bucket)).filter(pl.col("id") == row["id"]).to_dicts()
    for i, line in enumerate(lines):
        detail = {"file": line["file"], "line": line["line"], "source": row["source"]}
        if i:
            detail["reason"] = f"identical to {lines[0]['file']}:{lines[0]['line']}"
        yield Chapter("pool", "collapsed" if i else "read", detail)


def _added(
    workspace: Workspace, name: str, recipes: list[Any]
) -> Iterator[tuple[str, list[Chapter]]]:
    """Rows that a stage brought: no pool knows them."""
    for recipe, done in recipes:
        for _, output in done:
            bucket = bucket_of(name.ljust(40, "0"), output.manifest.buckets)
            ids = output.added(bucket).column("id").to_pylist()
            for identity in [i for i in ids if i.startswith(name)]:
                chapters = list(_stages(identity, done, output.manifest.buckets))
                chapters += _published(workspace, recipe, identity)
                yield f"recipe {recipe.name}, row {identity}", chapters


def _stages(
    identity: str, done: list[tuple[Stage, StageOutput]], buckets: int
) -> Iterator[Chapter]:
    """What each stage said about a row, and what came of a candidate for its place."""
    for stage, output in done:
        yield from stage_chapters(identity, [(stage.name, output)], buckets)
        table = output.table("corrections")
        if table is None:
            continue
        for line in table.filter(pl.col("id") == identity).to_dicts():
            detail = {k: line[k] for k in ("outcome", "verdict", "confidence", "new_id")}
            yield Chapter(stage.name, "proposed", detail)


def _frame(table: Any) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _published(workspace: Workspace, recipe: Recipe, identity: str) -> Iterator[Chapter]:
    """One chapter per published version of the recipe that holds a row."""
    for folder in sorted(workspace.curated(recipe.name).glob("*/data")):
        version = folder.parent
        if version.is_symlink() or not is_version(version):  # latest
            continue
        tables = read_config(version, read_version(version), columns=["id"])
        if any(identity in table["id"].to_pylist() for table in tables):
            yield Chapter("curated", "published", {"version": version.name})
