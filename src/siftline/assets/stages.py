"""One asset per stage instance of a recipe: its decisions about every row."""

import dagster as dg

from siftline.assets import step as asking
from siftline.assets import step as keys
from siftline.assets.metadata import check_results, check_specs, stage_metadata
from siftline.assets.step import Siftline
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe, scorers_read
from siftline.rows.verified import content_hash
from siftline.stages.run import models_used, reads_likelihood, run_stage, sets_used, settings


def _deps(recipe: Recipe, stage: Stage) -> list[dg.AssetKey]:
    at = recipe.stages.index(stage)
    deps = [keys.stage(recipe, recipe.stages[at - 1]) if at else keys.pool(recipe.pool)]
    roles, models = sets_used(stage), models_used(recipe, stage)
    deps += [keys.pool(spec) for role, spec in recipe.sets.items() if role in roles]
    names = {recipe.roles.get(role, recipe.roles["target"]) for role in models}
    deps += [keys.model(n) for n in sorted(names) if recipe.models[n].pretrain is not None]
    if reads_likelihood(recipe, stage):
        deps.append(keys.likelihood(recipe))
    return [*deps, *(keys.scorer(recipe, name) for name in scorers_read(stage))]


def stage_asset(recipe: Recipe, stage: Stage) -> dg.AssetsDefinition:
    """The asset of one stage instance; it runs the stage, or finds its output."""
    key = keys.stage(recipe, stage)
    uses = models_used(recipe, stage)

    @dg.asset(
        key=key,
        deps=_deps(recipe, stage),
        group_name=recipe.name,
        kinds=keys.KINDS,
        description=(type(stage.options).__doc__ or "").split("\n")[0],
        pool="gpu" if uses else None,
        op_tags=asking.owned(recipe) | (asking.tags(recipe, "stage", stage.name) if uses else {}),
        check_specs=check_specs(key),
        code_version=content_hash(settings(recipe, stage))[:12],
    )
    def decided(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        loaded = siftline.recipe(recipe.name)
        output, fresh = run_stage(siftline.workspace, loaded, stage.name, context.log.info)
        return dg.MaterializeResult(
            metadata=stage_metadata(context, output, fresh),
            data_version=dg.DataVersion(output.manifest.version),
            check_results=check_results(key, loaded.stage(stage.name), output, loaded.bounds),
        )

    return decided
