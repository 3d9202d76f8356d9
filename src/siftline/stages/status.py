"""What is under a root, from its manifests and the store; no model is looked at."""

import os
from pathlib import Path
from typing import Any

import polars as pl

from siftline.ingest.pool import REJECTED, Pool, notes_of, reading_of
from siftline.recipe.parse import read_all
from siftline.rows.curated import TRIALS
from siftline.rows.shards import Manifest, read_part
from siftline.stages.publish import funnel
from siftline.stages.run import outputs_so_far
from siftline.store.cache import as_json, list_store
from siftline.workspace import Workspace


def describe(workspace: Workspace) -> dict[str, Any]:
    """Pools, score tables and their coverage, the store, and how far each recipe is.

    Raises:
        ValueError: if there is no such root.
    """
    if not workspace.root.is_dir():
        raise ValueError(f"{workspace.root} does not exist: run a recipe, or name another --root")
    valid, broken = read_all()
    pools = []
    for path in sorted(workspace.root.glob("pool/*/manifest.json")):
        info, name = Manifest.load(path).info, path.parent.name
        read = frozenset().union(*(recipe.columns_read(name) for recipe in valid))
        pools.append(
            {
                "name": name,
                "rows": info["rows"],
                "quarantined": info["quarantine"],
                **({REJECTED: info[REJECTED]} if REJECTED in info else {}),
                **reading_of(info, read),
                "notes": notes_of(info, read),
            }
        )
    paths = sorted(workspace.root.glob("scores/*/*/*/manifest.json"))
    recipes = []
    for recipe in valid:
        if not (workspace.pool(recipe.pool.name) / "manifest.json").exists():
            continue
        done = outputs_so_far(workspace, recipe)
        folder = workspace.curated(recipe.name)
        recipes.append(
            {
                "name": recipe.name,
                "pool_version": Pool(workspace.pool(recipe.pool.name)).version,
                "stages": len(recipe.stages),
                "stages_done": len(done),
                "rows": funnel(done),
                "versions": _versions(folder),
            }
        )
    return {
        "root": str(workspace.root),
        "pools": pools,
        "scores": [coverage(workspace, path.parent) for path in paths],
        "store": [as_json(entry) for entry in list_store(workspace.store)],
        "recipes": recipes,
        "broken_recipes": broken,
    }


def coverage(workspace: Workspace, folder: Path) -> dict[str, Any]:
    """How much of a pool a score table covers.

    Returns:
        `rows` of the pool as it is now, how many of them are `scored` and `failed`, the scored
        `share`, and whether the table is `stale`: made of another version of the pool. Where the
        pool is gone, rows and share are null and the counts are the table's own.
    """
    manifest = Manifest.load(folder / "manifest.json")
    info = manifest.info
    said: dict[str, Any] = {
        "name": folder.relative_to(workspace.root / "scores").as_posix(),
        "rows": None,
        "scored": info["scored"],
        "failed": info["failed"],
        "trimmed": info.get("trimmed", 0),
        "share": None,
        "stale": False,
    }
    home = workspace.pool(folder.relative_to(workspace.root / "scores").parts[0])
    if not (home / "manifest.json").exists():
        return said
    pool = Pool(home)
    rows = pool.manifest.rows("rows")
    said["stale"] = info["inputs"]["pool"] != pool.version
    if said["stale"]:
        ids = pl.Series(pool.all_rows(["id"]).column("id").to_pylist(), dtype=pl.String)
        for table in ("scored", "failed"):
            parts = [p for p in manifest.parts if p.table == table.replace("scored", "scores")]
            found = [read_part(folder, p, columns=["id"]).column("id").to_pylist() for p in parts]
            said[table] = ids.is_in([i for part in found for i in part]).sum()
    return {**said, "rows": rows, "share": said["scored"] / max(1, rows)}


def pool_lines(said: dict[str, Any]) -> list[str]:
    """Pools and what was noted about them, as lines.

    Args:
        said: What `describe` says.
    """
    lines = []
    for pool in said["pools"]:
        counts = f"{pool['rows']:,} rows, {pool['quarantined']:,} quarantined"
        lines += [f"pool {pool['name']}: {counts}", *(f"  {line}" for line in pool["notes"])]
    return lines


def coverage_text(said: dict[str, Any]) -> list[str]:
    """Score tables and the store as lines.

    Args:
        said: What `describe` says.
    """
    lines = []
    for scores in said["scores"]:
        counts = f"{scores['scored']:,} rows"
        if scores["rows"] is not None:
            share = f"{100 * scores['share']:.1f} %"
            counts = f"{scores['scored']:,} of {scores['rows']:,} rows ({share})"
        stale = ", stale: the pool has changed since, run again" if scores["stale"] else ""
        trimmed = f", {scores['trimmed']:,} trimmed by the template" if scores["trimmed"] else ""
        failed = f"{scores['failed']:,} failed{trimmed}"
        lines.append(f"scores {scores['name']}: {counts}, {failed}{stale}")
    for entry in said["store"]:
        writing = ", being written" if entry["in_use"] else ""
        lines.append(f"store {entry['name']}: {entry['records']:,} records{writing}")
    return lines


def _versions(folder: Path) -> list[str]:
    latest = os.readlink(folder / "latest") if (folder / "latest").is_symlink() else None
    trials = {os.readlink(link).rpartition("/")[2] for link in folder.glob(f"{TRIALS}/*")}
    names = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    names = [name for name in names if name != "latest"]
    marks = dict.fromkeys(trials, " (trial)") | {latest: " (latest)"}
    return [f"{folder.name}/{name}{marks.get(name, '')}" for name in names]
