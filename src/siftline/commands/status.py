"""`siftline status`: what is under a root."""

import json
from pathlib import Path

import click

from siftline.commands.options import json_option, root_option, say
from siftline.commands.outcome import funnel_text
from siftline.workspace import Workspace


@click.command()
@root_option
@json_option
def status(root: Path, as_json: bool) -> None:
    """Show what is under ROOT: pools, stages, score coverage, published versions."""
    from siftline.status import coverage_text, describe, pool_lines

    said = describe(Workspace(root.absolute()))
    if as_json:
        click.echo(json.dumps(said))
        return
    for line in pool_lines(said):
        click.echo(line)
    for line in coverage_text(said):
        click.echo(line)
    for recipe in said["recipes"]:
        click.echo(f"recipe {recipe['name']}: {recipe['stages_done']} of {recipe['stages']} stages")
        if recipe["rows"]:
            click.echo(funnel_text(recipe["rows"]))
        for version in recipe["versions"]:
            click.echo(f"curated {version}")
    for name, error in said["broken_recipes"].items():
        say(f"recipe {name} is not loaded: {error}")
    known = {recipe["name"] for recipe in said["recipes"]} | set(said["broken_recipes"])
    for folder in sorted(Workspace(root.absolute()).root.glob("curated/*")):
        if folder.name not in known:
            say(f"curated/{folder.name}: set SIFTLINE_RECIPES to its recipe's folder to see more")
