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
    from siftline.status import coverage_text, describe

    said = describe(Workspace(root.absolute()))
    if as_json:
        click.echo(json.dumps(said))
        return
    for pool in said["pools"]:
        click.echo(
            f"pool {pool['name']}: {pool['rows']:,} rows, {pool['quarantined']:,} quarantined"
        )
        for line in pool["notes"]:
            click.echo(f"  {line}")
    for line in coverage_text(said):
        click.echo(line)
    for recipe in said["recipes"]:
        click.echo(f"recipe {recipe['name']}: {recipe['stages_done']} of {recipe['stages']} stages")
        if recipe["rows"]:
            click.echo(funnel_text(recipe["rows"]))
        for version in recipe["versions"]:
            click.echo(f"curated {version}")
    known = {recipe["name"] for recipe in said["recipes"]}
    for folder in sorted(Workspace(root.absolute()).root.glob("curated/*")):
        if folder.name not in known:
            say(f"curated/{folder.name}: set SIFTLINE_RECIPES to its recipe's folder to see more")
