"""`siftline recipe`: what a recipe may say."""

import click


@click.group()
def recipe() -> None:
    """Say what a recipe may hold."""


@recipe.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of a recipe, stages and methods of installed packages included.

    Beside a recipe, as recipe.schema.json, it makes editors complete and check the recipe's keys,
    if the recipe begins with the line `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from siftline.recipe.schema import schema_text

    click.echo(schema_text(), nl=False)
