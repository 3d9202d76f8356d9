"""How the verbs on plain files are told to read them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from siftline.ingest.source import FIELDS, Format, Layout, Source

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
