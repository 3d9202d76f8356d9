"""What comes after the stages: the published version, models, their evaluation, the report."""

from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from siftline.assets import step as asking
from siftline.assets import step as keys
from siftline.assets.metadata import picture, shown_before
from siftline.assets.step import Siftline
from siftline.recipe.parse import Recipe
from siftline.report import plots
from siftline.rows.verified import content_hash
from siftline.stages.arms import Arm, arms_pending, train_arms
from siftline.stages.evaluation import evaluate_arms, evaluation_pending
from siftline.stages.publish import publish_curated
from siftline.stages.reporting import write_report


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


def curated_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The published version."""

    @dg.asset(
        key=keys.outcome(recipe, "curated"),
        deps=[
            keys.stage(recipe, recipe.stages[-1]),
            *(keys.scorer(recipe, name) for name in recipe.scorers),
        ],
        group_name=recipe.name,
        kinds=keys.KINDS,
    )
    def curated(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Immutable versioned Parquet with a dataset card, removed rows and a manifest."""
        published = publish_curated(siftline.workspace, siftline.recipe(recipe.name))
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": published.rows,
                "dagster/uri": str(published.path),
                "version": published.version,
                "files": dg.MetadataValue.json(list(published.files)),
                "computed": published.new,
            },
            data_version=dg.DataVersion(published.version),
        )

    return curated


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
        op_tags=asking.tags(recipe, "arms", "training"),
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
        op_tags=asking.tags(recipe, "evaluation", "evaluation"),
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
        op_tags=asking.tags(recipe, part, "report") if part else None,
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
                "rows": dg.MetadataValue.json(numbers["rows"]),
                "notes": dg.MetadataValue.json(numbers["notes"]),
            },
            data_version=dg.DataVersion(content_hash(numbers)),
        )

    return report
