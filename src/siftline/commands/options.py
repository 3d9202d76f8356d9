"""What the verbs of the command line share: options, and lines on stderr."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from siftline.library import find
from siftline.progress import Tracker
from siftline.recipe import Recipe, load
from siftline.workspace import DEFAULT_ROOT, ROOT_VARIABLE

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=lambda: Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT)),
    help=f"Folder that everything is written to [default: ${ROOT_VARIABLE}, or {DEFAULT_ROOT}]",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def make_tracker(label: str, total: int, unit: str) -> Tracker:
    """Progress on stderr: a bar on a terminal, lines at an interval elsewhere."""
    from siftline.terminal import tracker

    return tracker(label, total, unit, sys.stderr, say)


def say(line: str) -> None:
    """Writes a line of progress to stderr."""
    click.echo(line, err=True)


def named_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe by name or by file; a file's folder is added to those Dagster looks in."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        loaded = load(path, overrides)
        if path.suffix != ".yaml" or path.stem != loaded.name:
            raise ValueError(f"{path.name}: call the file {loaded.name}.yaml, as the recipe's name")
        known = os.environ.get("SIFTLINE_RECIPES", "")
        folders = [str(path.resolve().parent), *([known] if known else [])]
        os.environ["SIFTLINE_RECIPES"] = os.pathsep.join(folders)
        return loaded
    return find(name, overrides)
