"""The command line: data on stdout, logs on stderr, one line per error.

Verbs do what the Dagster assets do, on the same root and the same instance. The list of verbs is a
table, so that neither it nor a verb's help reads the code of another.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

from siftline import __version__
from siftline.commands import VERBS


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
        command = getattr(import_module(f"siftline.commands.{verb.module}"), verb.name)
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


if __name__ == "__main__":
    main()
