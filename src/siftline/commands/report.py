"""`siftline report`: funnel, accuracy and page of the newest version."""

from pathlib import Path

import click

from siftline.commands.options import json_option, named_recipe, root_option, set_option
from siftline.commands.outcome import show, summary
from siftline.workspace import Workspace


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--planted", is_flag=True, help="Add what a generator planted and gates caught.")
@json_option
def report(
    recipe: str, root: Path, overrides: tuple[str, ...], planted: bool, as_json: bool
) -> None:
    """Show the funnel, accuracy and report page of RECIPE's newest version."""
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, overrides)
    result = summary(workspace, loaded)
    if planted:
        from siftline.demo.summary import audited

        result = audited(workspace, loaded, result)
    show(result, as_json)
