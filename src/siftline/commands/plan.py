"""`siftline plan`: what rejection sampling will cost."""

import json
from pathlib import Path

import click

from siftline.commands.options import (
    json_option,
    limit_options,
    limited,
    named_recipe,
    root_option,
    say,
    set_option,
)
from siftline.commands.outcome import start
from siftline.workspace import Workspace


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--workers", default=2, show_default=True, help="Model steps at a time.")
@limit_options
@json_option
def plan(
    recipe: str,
    root: Path,
    overrides: tuple[str, ...],
    workers: int,
    max_draws: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Say what RECIPE's rejection sampling will cost, from its pilot.

    Runs the stages before it where they have not run, and draws the pilot; its draws are kept and
    count. Without --max-draws and --max-tokens it says what meeting the targets takes.
    """
    from siftline.stages.rejection_sampling.planning import plan_stage, sampling_stages
    from siftline.stages.run import outputs_so_far

    changed = limited(recipe, overrides, max_draws, max_tokens)
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, changed)
    names = sampling_stages(loaded)
    if not names:
        raise ValueError(f"recipe {loaded.name!r} has no rejection_sampling stage to plan")
    order = [stage.name for stage in loaded.stages]
    before = order[: order.index(names[0])]
    done = [stage.name for stage, _ in outputs_so_far(workspace, loaded)]
    if not before or before[-1] not in done:
        stage = f'key:"{loaded.name}/{names[0]}"'
        start(workspace, loaded, changed, workers=workers, select=f"+{stage} and not {stage}")
    for later in names[1:]:
        say(f"{later}: can be planned when {names[0]} has run")
    said = plan_stage(workspace, loaded, names[0], say)
    if as_json:
        click.echo(json.dumps({"stage": names[0], **said.as_json()}))
        return
    click.echo(f"{names[0]}: {said}")
