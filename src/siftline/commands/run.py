"""`siftline run`: a recipe from raw rows to the report."""

from pathlib import Path

import click

from siftline.commands.options import (
    json_option,
    limit_options,
    limited,
    named_recipe,
    root_option,
    set_option,
)
from siftline.commands.outcome import show, start, summary
from siftline.workspace import Workspace


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--select", help="Dagster asset selection; by default everything.")
@click.option("--workers", default=2, show_default=True, help="Model steps at a time.")
@limit_options
@json_option
def run(
    recipe: str,
    root: Path,
    overrides: tuple[str, ...],
    select: str | None,
    workers: int,
    max_draws: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Run RECIPE, a name or a YAML file, from raw rows to the report."""
    changed = limited(recipe, overrides, max_draws, max_tokens)
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, changed)
    start(workspace, loaded, changed, workers=workers, select=select)
    if select is None:
        show(summary(workspace, loaded), as_json)
