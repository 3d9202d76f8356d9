"""Verbs that need no recipe; each module has one, and `register` adds them to the command line."""

import click


def register(group: click.Group) -> None:
    """Adds every verb of this folder to a group."""
    from siftline.commands.cache import cache
    from siftline.commands.score import score

    for command in (cache, score):
        group.add_command(command)
