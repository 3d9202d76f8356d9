"""Score tables of a pool: likelihood under the target model, and the recipe's quality scorers.

A row that fails is tried again at the next run; above the recipe's rate the check turns the run
red, and nothing downstream of it runs.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from siftline.assets import asking, keys
from siftline.assets.metadata import bounded, column_schema
from siftline.assets.resource import Siftline
from siftline.ingest.pool import Pool
from siftline.recipe.parse import Recipe
from siftline.rows.shards import Manifest
from siftline.rows.verified import content_hash
from siftline.scoring.measures.scorers import models_of
from siftline.stages.models import engines, model_spec
from siftline.stages.scorers import score_quality, scorer_model, scorer_table
from siftline.stages.scores import TABLE, Observe, likelihood_table, score_pool
from siftline.stages.tables import reasons_of
from siftline.workspace import Workspace

Emit = Callable[[str], None]


def failed_check(key: dg.AssetKey) -> dg.AssetCheckSpec:
    """The blocking check of every score table."""
    return dg.AssetCheckSpec(
        "failed_rows",
        asset=key,
        blocking=True,
        description="rows without a score stay below the recipe's rate",
    )


def observer(context: dg.AssetExecutionContext, key: dg.AssetKey) -> Observe:
    """Records each finished bucket on the asset's page while the step goes on."""
    began = time.monotonic()
    done = 0

    def observe(bucket: int, numbers: dict[str, Any]) -> None:
        nonlocal done
        done += numbers["scored"] + numbers["failed"]
        rate = done / max(time.monotonic() - began, 1e-9)
        shown = {"bucket": bucket, **numbers, "rows_so_far": done, "rows_per_second": rate}
        context.log_event(dg.AssetObservation(asset_key=key, metadata=shown))

    return observe


def result(
    key: dg.AssetKey,
    recipe: Recipe,
    folder: Path,
    manifest: Manifest,
    fresh: bool,
    shown: dict[str, Any],
) -> dg.MaterializeResult:
    """The materialization of a score table."""
    info = manifest.info
    rows = info["scored"] + info["failed"]
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": info["scored"],
            "failed": info["failed"],
            "coverage": info["scored"] / max(1, rows),
            "forward_rows_computed": info["computed"] if fresh else 0,
            "forward_rows_found": info["found"],
            "tokens_computed": info["tokens"] if fresh else 0,
            "computed": fresh,
            "failed_reasons": dg.MetadataValue.json(reasons_of(folder, manifest)),
            **shown,
        },
        data_version=dg.DataVersion(manifest.version),
        check_results=[
            bounded(
                key,
                "failed_rows",
                info["failed"],
                rows,
                "bounds.max_failed",
                recipe.bounds.max_failed,
                "they are asked again at the next run; mend what their reasons name, or raise the "
                "bound",
                reasons_of(folder, manifest),
            )
        ],
    )


def score(
    workspace: Workspace,
    recipe: Recipe,
    emit: Emit,
    observe: Observe = lambda bucket, numbers: None,
) -> tuple[Manifest, bool]:
    """Scores a recipe's pool under its target model."""
    pool = Pool(workspace.pool(recipe.pool.name))
    folder = workspace.scores(recipe.pool.name, recipe.roles["target"], "likelihood")
    spec, asked = model_spec(workspace, recipe, "target"), recipe.likelihood
    table = likelihood_table(folder, pool, spec, asked)
    with engines() as opened:
        return score_pool(table, pool, spec, asked, workspace.store, opened, emit, observe)


def likelihood_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The likelihood table of a pool under a recipe's target model."""
    deps = [keys.pool(recipe.pool)]
    if recipe.model("target").pretrain is not None:
        deps.append(keys.model(recipe.roles["target"]))
    engine = recipe.model("target").spec.engine
    key = keys.likelihood(recipe)

    @dg.asset(
        key=key,
        deps=deps,
        group_name=recipe.name,
        kinds={"parquet", engine},
        pool="gpu",
        op_tags=asking.tags(recipe, "likelihood", recipe.pool.name),
        check_specs=[failed_check(key)],
        code_version=content_hash([asdict(recipe.model("target")), asdict(recipe.likelihood)])[:12],
    )
    def likelihood(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Mean log-probability of every response, with and without its prompt."""
        loaded = siftline.shared(recipe.name)
        observe = observer(context, key)
        manifest, fresh = score(siftline.workspace, loaded, context.log.info, observe)
        folder = siftline.workspace.scores(loaded.pool.name, loaded.roles["target"], "likelihood")
        shown = {
            "dagster/column_schema": column_schema(TABLE),
            "engine": engine,
            "trimmed": manifest.info.get("trimmed", 0),
        }
        return result(key, loaded, folder, manifest, fresh, shown)

    return likelihood


def scorer_asset(recipe: Recipe, name: str) -> dg.AssetsDefinition:
    """The table of one quality scorer on a recipe's pool."""
    config, key = recipe.scorers[name], keys.scorer(recipe, name)
    models = models_of(config)
    trained = [m for m in models if recipe.models[m].pretrain is not None]
    said = content_hash([asdict(config), [asdict(recipe.models[m]) for m in models]])

    @dg.asset(
        key=key,
        deps=[keys.pool(recipe.pool), *(keys.model(m) for m in trained)],
        group_name=recipe.name,
        kinds={"parquet", *(recipe.models[m].spec.engine for m in models)},
        description=(type(config).__doc__ or "").split("\n")[0],
        pool="gpu" if models else None,
        op_tags=asking.tags(recipe, "scorer", name) if models else None,
        check_specs=[failed_check(key)],
        code_version=said[:12],
    )
    def quality(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        loaded, workspace = siftline.shared(recipe.name), siftline.workspace
        with engines() as opened:
            found = score_quality(
                workspace, loaded, name, opened, context.log.info, observer(context, key)
            )
        table = scorer_table(workspace, loaded, name)
        shown = {
            "dagster/column_schema": column_schema(table.schema),
            "scorer": type(config).__name__,
            "model": scorer_model(loaded, name),
        }
        return result(key, loaded, table.folder, found.manifest, found.fresh, shown)

    return quality
