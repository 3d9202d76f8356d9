"""Runs stages and finds what they wrote.

A stage's output is named by a key: a hash of its configuration, of everything upstream, and of the
models it asks. So an unchanged stage is found instead of run, a changed one never overwrites
another's decisions, and any process can find the outputs of a recipe by reading manifests.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from siftline.disk import writing
from siftline.ingest.pool import Pool
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe, scorers_read
from siftline.rows.ledger import StageOutput, write_stage
from siftline.rows.verified import RERUN, AlteredError, UnhashedError, content_hash, plain
from siftline.stages.canaries import canaries_of, held_rows_of
from siftline.stages.context import Context
from siftline.stages.models import engines, identity, model_spec
from siftline.stages.scorers import scorer_table
from siftline.workspace import Workspace

DRAWS = 2
"""Version of how canaries' rows are drawn; no other bytes depend on it."""
VERSION = 7
"""Version of the stages' code as a whole; raise it when decisions change for equal inputs."""


def models_used(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """Roles of the models that a stage asks."""
    return stage.of.models(stage.options, recipe.budget)


def reads_likelihood(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage needs the rows scored under the target model before it runs."""
    return stage.of.likelihoods(stage.options, recipe.budget)


def sets_used(stage: Stage) -> tuple[str, ...]:
    """Roles of the evaluation sets that a stage sees."""
    return stage.of.sets(stage.options)


def settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a recipe and this code say about a stage, whatever it will be run on; JSON."""
    planted, scored = canaries_of(recipe, stage), "target" in models_used(recipe, stage)
    return {
        "code": VERSION,
        "kind": stage.kind,
        "scope": stage.scope,
        "options": asdict(stage.options),
        **({"budget": [recipe.budget.unit, recipe.budget.size]} if stage.of.budgeted else {}),
        **({"likelihood": asdict(recipe.likelihood)} if scored else {}),
        **stage.of.inputs(stage, recipe),
        **({"canaries": [asdict(planted), recipe.seed, DRAWS]} if planted else {}),
    }


def _inputs(
    workspace: Workspace, recipe: Recipe, stage: Stage, before: list[tuple[Stage, StageOutput]]
) -> dict[str, Any]:
    """Everything that a stage's decisions depend on; JSON."""
    upstream = before[-1][1].manifest if before else None
    roles, wanted = models_used(recipe, stage), sets_used(stage)
    return {
        **settings(recipe, stage),
        "pool": Pool(workspace.pool(recipe.pool.name)).version,
        "upstream": [upstream.version, _made_of(upstream)] if upstream else None,
        "scores": _scores_read(workspace, recipe, stage),
        "models": {role: identity(model_spec(workspace, recipe, role)) for role in roles},
        "sets": {
            f"{role}/{spec.name}": Pool(workspace.pool(spec.name)).version
            for role, spec in recipe.sets.items()
            if role in wanted
        },
    }


def _made_of(upstream: Any) -> str:
    """Hash of what an output was made of; its canaries decided nothing that comes after it."""
    identity = {k: v for k, v in upstream.info["identity"].items() if k != "canaries"}
    return content_hash(identity)


def _scores_read(workspace: Workspace, recipe: Recipe, stage: Stage) -> Any:
    """What the quality scores that a stage reads are made of."""
    made = [dict(scorer_table(workspace, recipe, name).inputs) for name in scorers_read(stage)]
    return made[0] if len(made) == 1 else made or None


def _path(workspace: Workspace, recipe: Recipe, stage: Stage, inputs: dict[str, Any]) -> Path:
    return workspace.stage(recipe.name, stage.name) / f"{content_hash(inputs)[:12]}.json"


def outputs_so_far(
    workspace: Workspace, recipe: Recipe, until: str | None = None
) -> list[tuple[Stage, StageOutput]]:
    """Outputs of a recipe's stages in order, up to the first that has not run or to `until`."""
    found: list[tuple[Stage, StageOutput]] = []
    for stage in recipe.stages:
        if stage.name == until:
            break
        try:
            inputs = _inputs(workspace, recipe, stage, found)
        except AlteredError:
            raise
        except ValueError:  # a model or a set that this stage needs is not there yet
            break
        output = _written(_path(workspace, recipe, stage, inputs), inputs)
        if output is None:
            break
        found.append((stage, output))
    return found


def _written(path: Path, inputs: dict[str, Any]) -> StageOutput | None:
    """The output at `path`, or None where it or one of its parts is not there.

    Raises:
        ValueError: if the file is damaged, or holds the output of something else.
    """
    try:
        output = StageOutput(path) if path.exists() else None
    except UnhashedError:  # of an earlier version of Siftline: it is made again
        return None
    if output is None:
        return None
    if output.manifest.info.get("identity") != plain(inputs):
        raise AlteredError(f"{path} was replaced by the output of another stage: {RERUN}")
    return None if output.manifest.missing(output.folder) else output


def outputs(
    workspace: Workspace, recipe: Recipe, until: str | None = None
) -> list[tuple[Stage, StageOutput]]:
    """Outputs of a recipe's stages in order, up to but not including `until`.

    Raises:
        ValueError: naming the first stage that was not run with these settings.
    """
    found = outputs_so_far(workspace, recipe, until)
    rest = [stage.name for stage in recipe.stages[len(found) :]]
    if rest and rest[0] != until:
        raise ValueError(
            f"stage {recipe.name}/{rest[0]} has not been run with these settings: "
            "materialize it first"
        )
    return found


def _reusable(path: Path, inputs: dict[str, Any]) -> StageOutput | None:
    """The output at `path` where nothing in it wants to be tried again; see `run_stage`."""
    found = _written(path, inputs)
    if found is None or found.accounting.failed or found.facts.get("unanswered"):
        return None
    return found


def stage_asks(workspace: Workspace, recipe: Recipe, name: str) -> bool:
    """Whether a stage will load a model when it is run now.

    Not where its output is found, nor where it only reads likelihoods and every row it sees is in
    the pool's score table.

    Raises:
        ValueError: if a stage before it, a model or a set is not there yet.
    """
    stage = recipe.stage(name)
    if not models_used(recipe, stage):
        return False
    before = outputs(workspace, recipe, until=name)
    inputs = _inputs(workspace, recipe, stage, before)
    if _reusable(_path(workspace, recipe, stage, inputs), inputs) is not None:
        return False
    plants = canaries_of(recipe, stage) is not None
    added = any(output.accounting.added for _, output in before)
    return not stage.of.found or plants or added


def run_stage(
    workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]
) -> tuple[StageOutput, bool]:
    """Runs one stage, or finds its output where nothing it depends on changed.

    Failed rows are tried again: an output with failed rows is not reused, nor is one whose facts
    count questions that got no answer (`unanswered`) though its rows were decided.

    Args:
        workspace: The root.
        recipe: The recipe.
        name: The stage's name.
        emit: Takes lines of progress.

    Returns:
        The output, and whether it was computed now.
    """
    stage = recipe.stage(name)
    before = outputs(workspace, recipe, until=name)
    inputs = _inputs(workspace, recipe, stage, before)
    path = _path(workspace, recipe, stage, inputs)
    found = _reusable(path, inputs)
    if found is not None:
        return found, False
    pool = Pool(workspace.pool(recipe.pool.name))
    with engines() as opened, writing(workspace.stage(recipe.name, name)):
        context = Context(workspace, recipe, stage, pool, before, opened, emit)
        rows_in = sum(len(context.in_play(bucket)) for bucket in context.buckets)
        if not rows_in:
            raise ValueError(
                f"stage {recipe.name}/{name}: no rows are left to judge: loosen a gate"
            )
        run = stage.of.runner()(replace(context, held_rows=held_rows_of(recipe, stage, rows_in)))
    output = write_stage(
        path, run.results, rows_in=rows_in, tables=run.tables, facts=run.facts, identity=inputs
    )
    assert output.accounting.closes, output.accounting
    return output, True
