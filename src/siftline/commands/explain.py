"""`siftline explain`: the story of a row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siftline.commands.options import json_option, named_recipe, root_option, say, set_option
from siftline.workspace import Workspace

if TYPE_CHECKING:
    from siftline.recipe.kinds import Stage
    from siftline.recipe.parse import Recipe
    from siftline.rows.ledger import StageOutput


def recipe_outputs(
    workspace: Workspace, overrides: Sequence[str], only: str | None
) -> "list[tuple[Recipe, list[tuple[Stage, StageOutput]]]]":
    """Every recipe whose pool is built, with the stages that have run."""
    from siftline.recipe.library import recipe_files
    from siftline.stages.run import outputs_so_far

    found = []
    for name in [only] if only else sorted(recipe_files()):
        recipe = named_recipe(name, overrides if only else ())
        if (workspace.pool(recipe.pool.name) / "manifest.json").exists():
            found.append((recipe, outputs_so_far(workspace, recipe)))
    return found


@click.command()
@click.argument("identity", metavar="ID")
@root_option
@click.option("--recipe", help="Only this recipe, a name or a YAML file.")
@set_option
@json_option
def explain(
    identity: str, root: Path, recipe: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Tell the whole story of a row: ID is its id (8 digits or more), or FILE:LINE."""
    from siftline.story import explain as tell

    if overrides and recipe is None:
        raise ValueError("--set changes a recipe: name it with --recipe")
    workspace = Workspace(root.absolute())
    stories = tell(workspace, identity, recipe_outputs(workspace, overrides, recipe))
    if as_json:
        told = [
            {"of": title, "chapters": [vars(chapter) for chapter in chapters]}
            for title, chapters in stories
        ]
        click.echo(json.dumps(told))
        return
    if recipe is None and any(title.startswith("pool ") for title, _ in stories):
        say("a recipe of your own is told with --recipe FILE, or its folder in SIFTLINE_RECIPES")
    for title, chapters in stories:
        click.echo(title)
        for chapter in chapters:
            click.echo(f"  {chapter}")
