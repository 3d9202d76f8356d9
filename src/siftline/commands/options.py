"""What the verbs of the command line share: options, and lines on stderr."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.progress import Tracker
from siftline.workspace import DEFAULT_ROOT, ROOT_VARIABLE

if TYPE_CHECKING:
    from siftline.recipe.parse import Recipe

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


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --max-draws and --max-tokens."""
    for name, what in (("--max-tokens", "Most tokens generated"), ("--max-draws", "Most draws")):
        command = click.option(
            name, type=click.IntRange(1), help=f"{what} by rejection sampling, never passed."
        )(command)
    return command


def limited(
    name: str, overrides: Sequence[str], max_draws: int | None, max_tokens: int | None
) -> tuple[str, ...]:
    """The overrides of a recipe and, of each of its rejection sampling stages, the limits.

    Raises:
        ValueError: if there is a limit and no such stage.
    """
    limits = {"max_draws": max_draws, "max_tokens": max_tokens}
    given = {key: value for key, value in limits.items() if value is not None}
    if not given:
        return tuple(overrides)
    recipe = named_recipe(name, overrides)
    stages = [stage.name for stage in recipe.stages if stage.kind == "rejection_sampling"]
    if not stages:
        raise ValueError(f"recipe {recipe.name!r} has no rejection_sampling stage to limit")
    if len(stages) > 1:
        raise ValueError(
            f"recipe {recipe.name!r} has {len(stages)} rejection_sampling stages: give each its "
            f"limit, e.g. --set stages.{stages[0]}.max_draws=1000"
        )
    return (
        *overrides,
        *(f"stages.{stage}.{key}={value}" for stage in stages for key, value in given.items()),
    )


def make_tracker(label: str, total: int, unit: str) -> Tracker:
    """Progress on stderr: a bar on a terminal, lines at an interval elsewhere."""
    from siftline.terminal import tracker

    return tracker(label, total, unit, sys.stderr, say)


def say(line: str) -> None:
    """Writes a line of progress to stderr."""
    click.echo(line, err=True)


@contextmanager
def lines_beside_a_run() -> Iterator[Callable[[str], None]]:
    """`say` to stderr as it is now: while steps run in this process, Dagster captures the other."""
    try:
        copy = os.dup(sys.stderr.fileno())
    except (OSError, ValueError):  # not a file: nothing captures it
        yield say
        return
    with os.fdopen(copy, "w", encoding="utf-8") as out:
        yield lambda line: click.echo(line, file=out)


def named_recipe(name: str, overrides: Sequence[str]) -> "Recipe":
    """A recipe by name or by file; a file's folder is added to those Dagster looks in."""
    from siftline.recipe.library import find, recipe_files
    from siftline.recipe.parse import load

    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_dir():
            raise ValueError(f"{path} is a folder, no recipe: name a YAML file in it")
        loaded = load(path, overrides)
        if path.suffix != ".yaml" or path.stem != loaded.name:
            raise ValueError(f"{path.name}: call the file {loaded.name}.yaml, as the recipe's name")
        known = os.environ.get("SIFTLINE_RECIPES", "")
        folders = [str(path.resolve().parent), *([known] if known else [])]
        os.environ["SIFTLINE_RECIPES"] = os.pathsep.join(folders)
        return loaded
    if path.is_dir() and name not in recipe_files():
        raise ValueError(f"{path} is a folder, no recipe: name a YAML file in it")
    return find(name, overrides)
