"""Recipes as Dagster sees them: their assets, jobs, schedules and sensors."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import dagster as dg
from dagster_shared.check import CheckError

from siftline.assets.outcome import outcome_assets, outcomes
from siftline.assets.resource import siftline_resource
from siftline.assets.scores import likelihood_asset, scorer_asset
from siftline.assets.shared import files_asset, inputs_asset, model_asset, pool_asset
from siftline.assets.stages import stage_asset
from siftline.pipelines.executor import step_executor
from siftline.pipelines.jobs import (
    Broken,
    broken_recipe,
    new_files_sensor,
    recipe_job,
    recipe_schedule,
)
from siftline.recipe.library import find
from siftline.recipe.parse import Recipe


def recipe_assets(recipe: Recipe) -> list[dg.AssetsDefinition | dg.SourceAsset]:
    """Every asset of one recipe, shared ones included."""
    assets: list[dg.AssetsDefinition | dg.SourceAsset] = []
    assets += [inputs_asset(recipe)] if recipe.inputs else []
    assets.append(pool_asset(recipe, recipe.pool, "train"))
    assets += [pool_asset(recipe, spec, role) for role, spec in recipe.sets.items()]
    specs = (recipe.pool, *(spec for _, spec in recipe.sets.items()))
    assets += [found for spec in specs if (found := files_asset(recipe, spec)) is not None]
    assets += [model_asset(recipe, name) for name, model in recipe.models.items() if model.pretrain]
    assets.append(likelihood_asset(recipe))
    assets += [scorer_asset(recipe, name) for name in recipe.scorers]
    assets += [stage_asset(recipe, stage) for stage in recipe.stages]
    return [*assets, *outcome_assets(recipe)]


def compose(
    recipes: Sequence[Recipe], broken: Mapping[str, str] = MappingProxyType({})
) -> dg.Definitions:
    """Recipes as one set of definitions.

    Args:
        recipes: Valid recipes.
        broken: What is wrong with each of the others.

    Raises:
        ValueError: if two define one shared asset differently, or a name is taken.
    """
    for recipe in recipes:
        _check_names(recipe)
    assets: dict[dg.AssetKey, dg.AssetsDefinition | dg.SourceAsset] = {}
    owners: dict[dg.AssetKey, Recipe] = {}
    for recipe in recipes:
        for asset in recipe_assets(recipe):
            other = owners.setdefault(asset.key, recipe)
            if other is not recipe and shared_part(other) != shared_part(recipe):
                raise ValueError(
                    f"recipes {other.name!r} and {recipe.name!r} both define "
                    f"{asset.key.to_user_string()} and differ: rename the pool or model in one"
                )
            assets.setdefault(asset.key, asset)
    jobs = {recipe.name: recipe_job(recipe) for recipe in recipes}
    marks: list[Broken] = []
    for name, error in broken.items():
        label = re.sub(r"\W", "_", name)
        while label in {*jobs, *(mark.job.name for mark in marks)}:
            label += "_"
        marks.append(broken_recipe(name, label, error))
    return dg.Definitions(
        assets=[*assets.values(), *(mark.asset for mark in marks)],
        jobs=[*jobs.values(), *(mark.job for mark in marks)],
        schedules=[recipe_schedule(recipe, jobs[recipe.name]) for recipe in recipes]
        + [mark.schedule for mark in marks],
        sensors=[new_files_sensor(recipe, jobs[recipe.name]) for recipe in recipes]
        + [mark.sensor for mark in marks],
        resources={"siftline": siftline_resource},
        executor=step_executor,
    )


_UNFIT = (ValueError, dg.DagsterError, CheckError)


def compose_all(recipes: Sequence[Recipe], broken: Mapping[str, str]) -> dg.Definitions:
    """All recipes: one that can't be composed, alone or beside the others, takes none other down.

    Args:
        recipes: Valid recipes; of two that don't go together the first by name stays.
        broken: What is wrong with each of the others.
    """
    try:
        return compose(recipes, broken)
    except _UNFIT:
        pass  # found below, one by one
    good: list[Recipe] = []
    wrong = dict(broken)
    for recipe in recipes:
        try:
            compose([*_sharing(recipe, good), recipe])
        except _UNFIT as error:
            wrong[recipe.name] = f"{recipe.name}.yaml: {' '.join(str(error).split())}"
        else:
            good.append(recipe)
    return compose(good, dict(sorted(wrong.items())))


def _sharing(recipe: Recipe, others: Sequence[Recipe]) -> list[Recipe]:
    """Those of the others with which a recipe has a pool, a set or a model in common."""
    return [other for other in others if recipe.shared_names & other.shared_names]


def _check_names(recipe: Recipe) -> None:
    """Refuses a stage whose asset would take the place of another of the recipe's."""
    for stage in recipe.stages:
        if stage.name in outcomes(recipe):
            raise ValueError(
                f"recipe {recipe.name!r}: a stage can't be called {stage.name!r}, that is what "
                "comes after the stages: rename it"
            )


def shared_part(recipe: Recipe) -> tuple[object, ...]:
    """What two recipes must agree on to share pools, models and scores."""
    return (
        recipe.pool,
        recipe.sets,
        recipe.models,
        recipe.inputs,
        recipe.likelihood,
        recipe.scorers,
    )


def job_of(recipe: str) -> dg.JobDefinition:
    """The job of one recipe; what the processes of `siftline run` rebuild it from."""
    return compose([find(recipe)]).resolve_job_def(recipe)
