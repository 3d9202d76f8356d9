"""What is under a root, from manifests alone."""

import os
from typing import Any

from siftline.ingest.pool import Pool
from siftline.library import all_recipes
from siftline.shards import Manifest
from siftline.stages.publish import funnel
from siftline.stages.run import outputs_so_far
from siftline.workspace import Workspace


def describe(workspace: Workspace) -> dict[str, Any]:
    """Pools, score tables, and how far each recipe is.

    Raises:
        ValueError: if there is no such root.
    """
    if not workspace.root.is_dir():
        raise ValueError(f"{workspace.root} does not exist: run a recipe, or name another --root")
    pools = []
    for path in sorted(workspace.root.glob("pool/*/manifest.json")):
        info = Manifest.load(path).info
        pools.append(
            {"name": path.parent.name, "rows": info["rows"], "quarantined": info["quarantine"]}
        )
    scores = []
    for path in sorted(workspace.root.glob("scores/*/*/*/manifest.json")):
        info = Manifest.load(path).info
        name = path.parent.relative_to(workspace.root / "scores").as_posix()
        scores.append({"name": name, "scored": info["scored"], "failed": info["failed"]})
    recipes = []
    for recipe in all_recipes():
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
    return {"root": str(workspace.root), "pools": pools, "scores": scores, "recipes": recipes}


def _versions(folder: Any) -> list[str]:
    latest = os.readlink(folder / "latest") if (folder / "latest").is_symlink() else None
    names = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    names = [name for name in names if name != "latest"]
    return [f"{folder.name}/{name}{' (latest)' if name == latest else ''}" for name in names]
