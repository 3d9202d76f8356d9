"""`siftline demo`: the whole chain on generated data."""

import json
from pathlib import Path

import click

from siftline.commands.options import root_option, set_option
from siftline.commands.outcome import show, start, summary
from siftline.workspace import Workspace


@click.command()
@root_option
@set_option
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers",
    show_default=True, help="What runs the model.",
)  # fmt: skip
@click.option("--workers", default=2, show_default=True, help="Model steps at a time.")
def demo(root: Path, overrides: tuple[str, ...], engine: str, workers: int) -> None:
    """Run the whole chain on generated data with planted defects; no GPU, no download."""
    from siftline.demo.summary import audited
    from siftline.recipe.library import find

    changed = [*overrides, *([f"models.base.engine={engine}"] if engine != "transformers" else [])]
    workspace, loaded = Workspace(root.absolute()), find("demo", changed)
    start(workspace, loaded, changed, workers=workers)
    result = audited(workspace, loaded, summary(workspace, loaded))
    show(result, as_json=False)
    click.echo(json.dumps(result))
