"""What comes after the stages: the published version, models, their evaluation, the report."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager

from siftline.assets import step as asking
from siftline.assets import step as keys
from siftline.assets.metadata import check_result, picture, shown_before
from siftline.assets.step import Siftline, stop_if_cancelled
from siftline.recipe.parse import Recipe
from siftline.report import plots
from siftline.rows.curated import FORMAT, Published
from siftline.rows.shards import write_text
from siftline.rows.verified import content_hash
from siftline.stages.arms import Arm, arms_pending, train_arms
from siftline.stages.evaluation import evaluate_arms, evaluation_pending
from siftline.stages.publish import (
    as_read,
    came_and_went,
    keeps_latest,
    parent_of,
    publish_curated,
    published_columns,
)
from siftline.stages.reporting import write_report
from siftline.stages.run import outputs
from siftline.workspace import Workspace


def outcomes(recipe: Recipe) -> list[str]:
    """Names of what a recipe makes after its stages."""
    names = ["curated"]
    if recipe.training is not None:
        names.append("model")
    if recipe.evaluation is not None:
        names.append("evaluation")
    return [*names, "report"]


def outcome_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Assets of `outcomes`, in order."""
    make = {
        "curated": curated_asset,
        "model": fine_tuned_asset,
        "evaluation": evaluation_asset,
        "report": report_asset,
    }
    return [make[name](recipe) for name in outcomes(recipe)]


def _code(options: Any) -> str:
    """A code version: what the recipe says, in 12 hex digits."""
    return content_hash(asdict(options))[:12]


def curated_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The published version."""
    key = keys.outcome(recipe, "curated")

    @dg.asset(
        key=key,
        deps=[
            keys.stage(recipe, recipe.stages[-1]),
            *(keys.scorer(recipe, name) for name in recipe.scorers),
        ],
        group_name=recipe.name,
        kinds=keys.KINDS,
        op_tags=asking.owned(recipe),
        check_specs=_published_checks(key),
        code_version=content_hash([FORMAT, recipe.hash])[:12],
    )
    def curated(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Immutable versioned Parquet with a dataset card, removed rows and a manifest."""
        workspace, loaded = siftline.workspace, siftline.recipe(recipe.name)
        trial = siftline.is_trial(recipe.name) and keeps_latest(workspace, loaded)
        parent = parent_of(workspace, loaded)
        published = publish_curated(
            workspace,
            loaded,
            partial(stop_if_cancelled, context.instance, context.run_id),
            trial=trial,
        )
        changed = ", ".join(siftline.overrides)
        if trial:
            context.log.info(
                f"{recipe.name}/curated: version {published.version} lies beside `latest`, which "
                f"stays: this run changed {changed}"
            )
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": published.rows,
                "dagster/uri": str(published.path),
                "dagster/column_schema": _columns(published, loaded),
                "version": published.version,
                "path": dg.MetadataValue.path(str(published.path)),
                **_changes(context, published, parent),
                "files": dg.MetadataValue.json(list(published.files)),
                "computed": published.new,
                "is_latest": not trial,
                **({"changed_by_overrides": changed} if trial else {}),
            },
            data_version=dg.DataVersion(published.version),
            check_results=_published_verdicts(key, workspace, loaded, published),
        )

    return curated


def _columns(published: Published, recipe: Recipe) -> dg.TableSchema:
    """The version's columns, each with what it means."""
    means = published_columns(recipe)
    return dg.TableSchema(
        [
            dg.TableColumn(line["name"], line["type"], description=means.get(line["name"]))
            for line in published.manifest["schema"]
        ]
    )


def _changes(
    context: dg.AssetExecutionContext, published: Published, parent: Path | None
) -> dict[str, Any]:
    """The version before, and how many rows came and went against it."""
    if parent is not None and parent.name != published.version:
        came, went = came_and_went(parent, published.path)
        return {
            "parent_version": parent.name,
            "parent": dg.MetadataValue.path(str(parent)),
            "rows_came": came,
            "rows_went": went,
        }
    names = ("parent_version", "parent", "rows_came", "rows_went")
    return shown_before(context, published.version, *names) or {}


def _published_checks(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    described = {
        "all_rows": "the version holds every row that the last stage kept, once",
        "columns": "every file has the version's columns",
    }
    return [
        dg.AssetCheckSpec(name, asset=key, blocking=True, description=text)
        for name, text in described.items()
    ]


def _published_verdicts(
    key: dg.AssetKey, workspace: Workspace, recipe: Recipe, published: Published
) -> list[dg.AssetCheckResult]:
    """Looks at the files as a reader does."""
    kept = outputs(workspace, recipe)[-1][1].accounting.kept
    rows, distinct, odd = as_read(published)
    remedy = f"move {published.path} away, and run the recipe again"
    return [
        check_result(
            key,
            "all_rows",
            rows == distinct == kept,
            f"{rows:,} rows, {distinct:,} distinct, {kept:,} kept by the last stage",
            remedy,
            {"rows": rows, "rows_distinct": distinct, "rows_kept": kept},
        ),
        check_result(
            key,
            "columns",
            not odd,
            f"{', '.join(odd)}: other columns than the version's" if odd else "all files agree",
            remedy,
            {"files_odd": len(odd)},
        ),
    ]


def fine_tuned_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Fine-tuned models of every arm and seed."""

    @dg.asset(
        key=keys.outcome(recipe, "model"),
        deps=[
            keys.outcome(recipe, "curated"),
            keys.pool(recipe.pool),
            *(keys.pool(spec) for spec in recipe.sets.dev),  # for the dev loss
            *(keys.model(name) for name in _references(recipe)),
        ],
        group_name=recipe.name,
        kinds={"torch", "safetensors"},
        pool="gpu",
        op_tags=asking.owned(recipe) | asking.tags(recipe, "arms", "training"),
        code_version=_code(recipe.training),
    )
    def model(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Models trained on the curated rows and on random rows at equal cost."""
        workspace, loaded = siftline.workspace, siftline.recipe(recipe.name)
        fresh = arms_pending(workspace, loaded)
        arms = train_arms(workspace, loaded, context.log.info)
        version = content_hash(sorted(arm.folder.name for arm in arms))
        before = None if fresh else shown_before(context, version, "curves")
        return dg.MaterializeResult(
            metadata={
                "models": dg.MetadataValue.json(
                    {f"{arm.arm} seed {arm.seed}": str(arm.folder) for arm in arms}
                ),
                "loss_tokens": max(arm.loss_tokens for arm in arms),
                "steps": max(arm.steps for arm in arms),
                "computed": fresh,
                **(before or {"curves": _curves(arms)}),
            },
            data_version=dg.DataVersion(version),
        )

    return model


def _curves(arms: list[Arm]) -> dg.MarkdownMetadataValue:
    first = min(arm.seed for arm in arms)
    shown = {
        arm.arm: (arm.curve["step"].to_numpy(), arm.curve["loss"].to_numpy())
        for arm in arms
        if arm.seed == first
    }
    return picture(plots.curves(shown), "training loss")


def _references(recipe: Recipe) -> list[str]:
    """Models trained here whose scores the objective compares with."""
    named = recipe.training.reference if recipe.training else ()
    return [name for name in named if recipe.models[name].pretrain is not None]


def evaluation_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Accuracy of all arms on the test sets."""
    deps = [keys.pool(spec) for role, spec in recipe.sets.items() if role == "test"]
    deps.append(keys.outcome(recipe, "model" if recipe.training is not None else "curated"))

    @dg.asset(
        key=keys.outcome(recipe, "evaluation"),
        deps=deps,
        group_name=recipe.name,
        kinds={"python"},
        pool="gpu",
        op_tags=asking.owned(recipe) | asking.tags(recipe, "evaluation", "evaluation"),
        code_version=_code(recipe.evaluation),
    )
    def evaluation(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Accuracy by level with intervals, base and arms, on questions nothing else has read."""
        workspace, loaded = siftline.workspace, siftline.recipe(recipe.name)
        fresh = evaluation_pending(workspace, loaded)
        table, _ = evaluate_arms(workspace, loaded, context.log.info)
        version = content_hash(table.to_dicts())
        before = None if fresh else shown_before(context, version, "picture")
        overall = table.filter(pl.col("level") == "all")
        return dg.MaterializeResult(
            metadata={
                **{f"accuracy_{r['arm']}": float(r["accuracy"]) for r in overall.to_dicts()},
                "table": dg.MetadataValue.json(table.to_dicts()),
                "computed": fresh,
                **(before or {"picture": _accuracy(table)}),
            },
            data_version=dg.DataVersion(version),
        )

    return evaluation


def _accuracy(table: pl.DataFrame) -> dg.MarkdownMetadataValue:
    levels = table["level"].unique(maintain_order=True).to_list()
    arms: dict[str, Any] = {}
    for arm in table["arm"].unique(maintain_order=True).to_list():
        lines = {r["level"]: r for r in table.filter(arm=arm).to_dicts()}
        arms[arm] = tuple(
            np.array([lines[level][name] for level in levels], np.float64)
            for name in ("accuracy", "low", "high")
        )
    return picture(plots.accuracy(levels, arms), "accuracy by level")


def report_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The HTML report."""
    last = outcomes(recipe)[-2]
    # Run alone it trains and asks what is missing.
    part = {"model": "arms", "evaluation": "evaluation"}.get(last)

    @dg.asset(
        key=keys.outcome(recipe, "report"),
        deps=[keys.outcome(recipe, last)],
        group_name=recipe.name,
        kinds={"html"},
        op_tags=asking.owned(recipe) | (asking.tags(recipe, part, "report") if part else {}),
    )
    def report(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """One self-contained page: funnel, scores, clusters, difficulty, curves, accuracy."""
        workspace, loaded = siftline.workspace, siftline.recipe(recipe.name)
        if loaded.evaluation is not None:
            accuracy, arms = evaluate_arms(workspace, loaded, context.log.info)
        else:
            accuracy = None
            arms = train_arms(workspace, loaded, context.log.info) if loaded.training else []
        page, numbers = write_report(workspace, loaded, accuracy, arms)
        return dg.MaterializeResult(
            metadata={
                "page": dg.MetadataValue.path(str(page)),
                **_link(context, recipe.name, page),
                "rows": dg.MetadataValue.json(numbers["rows"]),
                "notes": dg.MetadataValue.json(numbers["notes"]),
            },
            data_version=dg.DataVersion(content_hash(numbers)),
        )

    return report


def _link(context: dg.AssetExecutionContext, recipe: str, page: Path) -> dict[str, Any]:
    """A link to the report through Dagster's web server, which serves what lies among its logs.

    Left out where logs are kept in a store of their own.
    """
    manager = context.instance.compute_log_manager
    if not isinstance(manager, LocalComputeLogManager):
        return {}
    key = ["reports", recipe, page.stem]
    served = Path(manager.get_captured_local_path(key, "html"))
    served.parent.mkdir(parents=True, exist_ok=True)
    write_text(served, page.read_text(encoding="utf-8"))
    return {"report": dg.MetadataValue.url(f"/logs/{'/'.join(key)}/html")}
