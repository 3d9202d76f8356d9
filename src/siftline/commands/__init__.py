"""Verbs of the command line; each module has one, and `register` adds them."""

import click


def register(group: click.Group) -> None:
    """Adds every verb of this folder to a group."""
    from siftline.commands.audit import audit
    from siftline.commands.cache import cache
    from siftline.commands.score import score

    for command in (audit, cache, score):
        group.add_command(command)
