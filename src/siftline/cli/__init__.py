"""The command line: data on stdout, logs on stderr, one line per error.

Verbs do what the Dagster assets do, on the same root and the same instance. The list of verbs is a
table, so that neither it nor a verb's help reads the code of another.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click

from siftline import __version__


class Verb(NamedTuple):
    """Where a verb is, and what the list of verbs says of it.

    Attributes:
        module: Below `siftline.cli`.
        name: Of the command in it.
        help: The first sentence of its help.
    """

    module: str
    name: str
    help: str


VERBS: dict[str, Verb] = {
    "audit": Verb(
        "published",
        "audit",
        "Draw removed rows of RECIPE's STAGE to label, and give the false-drop rate.",
    ),
    "cache": Verb(
        "cache", "cache", "List or clean the store, where every answer of a model is kept."
    ),
    "decontaminate": Verb(
        "judge",
        "decontaminate",
        "Remove rows of FILE... that overlap rows of other files, such as a test set.",
    ),
    "dedup": Verb(
        "dedup", "dedup", "Remove near duplicates from files of any format a recipe's pool reads."
    ),
    "demo": Verb(
        "recipes",
        "demo",
        "Run the whole chain on generated data with planted defects; no GPU, no download.",
    ),
    "eval": Verb("eval", "evaluate", "Ask MODEL the questions in FILE... and grade its answers."),
    "explain": Verb(
        "recipes",
        "explain",
        "Tell the whole story of a row: ID is its id (8 digits or more), or FILE:LINE.",
    ),
    "export": Verb(
        "published",
        "export",
        "Write the version in FOLDER for another trainer, with the configuration it wants.",
    ),
    "filter": Verb(
        "judge",
        "filter_rows",
        "Remove rows of FILE... whose text repeats itself, is of another language, or breaks a "
        "rule.",
    ),
    "plan": Verb(
        "recipes", "plan", "Say what RECIPE's rejection sampling will cost, from its pilot."
    ),
    "recipe": Verb("recipes", "recipe", "Say what a recipe may hold."),
    "report": Verb(
        "recipes",
        "report",
        "Show the funnel, accuracy and report page of RECIPE's newest version.",
    ),
    "rule": Verb(
        "rule",
        "rule",
        "Fit a rule for `siftline select linear_rule` on runs of your own (InstructMining).",
    ),
    "run": Verb(
        "recipes", "run", "Run RECIPE, a name or a YAML file, from raw rows to the report."
    ),
    "score": Verb(
        "score", "score", "Score the responses in FILE... under a model, without a recipe."
    ),
    "select": Verb(
        "select", "select", "Select a subset of the rows in FILE... by METHOD, without a recipe."
    ),
    "status": Verb(
        "recipes",
        "status",
        "Show what is under ROOT: pools, stages, score coverage, published versions.",
    ),
    "train": Verb("train", "train", "Fine-tune a model on CURATED and write a model directory."),
    "ui": Verb("recipes", "ui", "Serve the Dagster UI on ROOT."),
    "verify": Verb(
        "judge",
        "verify",
        "Remove rows of FILE... whose response contradicts, or never reaches, their answer.",
    ),
}


class Verbs(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all verbs."""
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of a verb; None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        verb = VERBS[cmd_name]
        command = getattr(import_module(f"siftline.cli.{verb.module}"), verb.name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of verbs from the table."""
        room = formatter.width - 6 - max(map(len, VERBS))
        brief = {name: click.Command(name, help=verb.help) for name, verb in VERBS.items()}
        lines = [(name, brief[name].get_short_help_str(room)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(lines)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="siftline")
def cli() -> None:
    """Curate instruction data, train on it, account for every row."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a ValueError or an OSError ends in one line and exit status 1."""
    guarded(lambda: cli.main(args=arguments, prog_name="siftline"))


def guarded(body: Callable[[], Any]) -> None:
    """Runs `body`; user errors become one line on stderr and exit status 1."""
    from siftline.disk import check_temporary, explained

    try:
        check_temporary()
        body()
    except Exception as found:
        error = explained(found) or found
        if not isinstance(error, ValueError | OSError):
            raise
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
