"""What the verbs of the command line share: options, and lines on stderr."""

import os
from pathlib import Path

import click

from siftline.workspace import DEFAULT_ROOT, ROOT_VARIABLE

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=lambda: Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT)),
    help=f"Folder that everything is written to [default: ${ROOT_VARIABLE}, or {DEFAULT_ROOT}]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def say(line: str) -> None:
    """Writes a line of progress to stderr."""
    click.echo(line, err=True)
