"""What the verbs of the command line share: options, and lines on stderr.

How the verbs on plain files are told to read them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from siftline.ingest.source import FIELDS, Format, Layout, Source
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
    from siftline.progress import tracker

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
    from siftline.recipe.parse import find, load, recipe_files

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


Command = TypeVar("Command", bound=Callable[..., Any])

field_option = click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="FIELD=COLUMN",
    help=f"Column of a field, where it has another name. Fields: {', '.join(FIELDS)}.",
)


def reading_options(command: Command) -> Command:
    """Adds --layout, --format, --field, --set-aside and --split."""
    layout = click.option(
        "--layout",
        type=click.Choice(get_args(Layout)),
        default="auto",
        show_default=True,
        help="How records hold a conversation.",
    )
    form = click.option(
        "--format",
        "form",
        type=click.Choice(get_args(Format)),
        default="auto",
        show_default=True,
        help="How the files are written.",
    )
    aside = click.option(
        "--set-aside",
        "set_aside",
        multiple=True,
        metavar="COLUMN",
        help="Leave a column unread, whatever its name says; again.",
    )
    split = click.option(
        "--split", default="train", show_default=True, help="Of a dataset that has several."
    )
    return layout(form(field_option(aside(split(command)))))


def embedding_options(command: Command) -> Command:
    """Adds --embeddings, --embedding-column and --embedder."""
    stored = click.option(
        "--embeddings",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Parquet files with id, or file and row (from 1), and an embedding.",
    )
    column = click.option(
        "--embedding-column", default="embedding", show_default=True, help="Its column there."
    )
    model = click.option(
        "--embedder", metavar="DIR", help="Model directory to embed with here; kept in the output."
    )
    return stored(column(model(command)))


def columns_of(fields: Sequence[str]) -> dict[str, str]:
    """Columns by field, of values of --field.

    Raises:
        ValueError: if one is not FIELD=COLUMN.
    """
    columns = {}
    for pair in fields:
        field, mark, column = pair.partition("=")
        if not (field and mark and column):
            raise ValueError(f"--field {pair!r}: give it as FIELD=COLUMN")
        columns[field] = column
    return columns


def source_of(path: str, given: dict[str, Any]) -> Source:
    """A file as the options say it is to be read."""
    columns = columns_of(given["fields"])
    return Source(
        path,
        format=given["form"],
        layout=given["layout"],
        columns=columns,
        split=given["split"],
        set_aside=given["set_aside"],
    )
