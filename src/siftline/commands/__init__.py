"""Verbs of the command line; each module has one, and `register` adds them."""

import click


def register(group: click.Group) -> None:
    """Adds every verb of this folder to a group."""
    from siftline.commands.audit import audit
    from siftline.commands.cache import cache
    from siftline.commands.dedup import dedup
    from siftline.commands.eval import evaluate
    from siftline.commands.export import export
    from siftline.commands.rule import rule
    from siftline.commands.score import score
    from siftline.commands.select import select
    from siftline.commands.train import train

    for command in (audit, cache, dedup, evaluate, export, rule, score, select, train):
        group.add_command(command)
