"""`siftline select`: a subset of the rows in plain files by any selection method."""

import json
from pathlib import Path
from typing import Any

import click

from siftline.cli.options import (
    embedding_options,
    json_option,
    make_tracker,
    reading_options,
    say,
    source_of,
)


@click.command()
@click.argument("method", required=False)
@click.argument("files", metavar="FILE...", nargs=-1)
@click.option("--list", "listed", is_flag=True, help="Print the table of methods.")
@click.option("--budget", type=int, help="How much to keep, in --unit.")
@click.option(
    "--unit",
    type=click.Choice(["rows", "loss_tokens"]),
    default="rows",
    show_default=True,
    help="What the budget counts; tokens need --scores.",
)
@click.option(
    "--on-shortfall",
    type=click.Choice(["error", "smaller"]),
    default="error",
    show_default=True,
    help="What to do where the rows are fewer than the budget.",
)
@click.option(
    "--on-missing",
    type=click.Choice(["error", "drop"]),
    default="error",
    show_default=True,
    help="What to do with rows that lack a score or an embedding.",
)
@click.option(
    "--target", "targets", multiple=True, metavar="FILE", help="Rows like those that are wanted."
)
@click.option(
    "--scores", metavar="DIR", type=click.Path(path_type=Path), help="What `siftline score` wrote."
)
@embedding_options
@click.option(
    "--rule",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `siftline rule fit` wrote, for linear_rule.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of every draw.")
@click.option(
    "--set", "overrides", multiple=True, metavar="OPTION=VALUE", help="An option of the method."
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder for the selection.")
@reading_options
@json_option
def select(
    method: str | None, files: tuple[str, ...], listed: bool, as_json: bool, **given: Any
) -> None:
    """Select a subset of the rows in FILE... by METHOD, without a recipe.

    Writes selection.parquet, one line per input row with why it was kept or not, and data/ with the
    kept records as they were. METHOD is a name of the table (--list), which has those of installed
    packages too, or your own as package.module:Class. FILE is anything a recipe's pool reads.
    """
    if listed:
        click.echo(json.dumps(table()) if as_json else _table_text())
        return
    if method is None or not files:
        raise ValueError("select needs METHOD and FILE...: see siftline select --list")
    for name in ("budget", "out"):
        if given[name] is None:
            raise ValueError(f"--{name} is missing: {_MISSING[name]}")
    from siftline.cli.select_run import Request, select_files

    sources = [source_of(path, given) for path in files]
    request = Request(
        method=method,
        sources=tuple(sources),
        targets=tuple(source_of(path, given) for path in given["targets"]),
        budget=given["budget"],
        unit=given["unit"],
        on_shortfall=given["on_shortfall"],
        on_missing=given["on_missing"],
        scores=given["scores"],
        embeddings=given["embeddings"],
        embedding_column=given["embedding_column"],
        embedder=given["embedder"],
        rule=given["rule"],
        seed=given["seed"],
        overrides=given["overrides"],
    )
    result = select_files(request, given["out"].absolute(), make_tracker, say)
    click.echo(json.dumps(result) if as_json else _text(result))


_MISSING = {"budget": "how many rows, or loss tokens, to keep", "out": "name a new folder"}


def table() -> list[dict[str, Any]]:
    """The table of methods: JSON."""
    from siftline.selectors.registry import methods

    return [
        {
            "method": entry.name,
            "needs": list(entry.needs),
            "scope": entry.scope,
            "limit": entry.limit,
            "limit_width": entry.width,
            "options": entry.options(),
            "good_for": entry.good_for,
            "warning": entry.warning,
            "source": entry.source,
            "package": entry.distribution,
        }
        for entry in methods()
    ]


def _table_text() -> str:
    lines = []
    for line in table():
        needs = ", ".join(line["needs"]) or "nothing"
        limit = f"up to {line['limit']:,} rows"
        if line["limit_width"]:
            limit += f" of {line['limit_width']:,} values"
        lines.append(f"{line['method']:<18} {line['scope']:<8} {limit}")
        lines.append(f"    needs     {needs}")
        lines.append(f"    good for  {line['good_for']}")
        lines.append(f"    beware    {line['warning']}")
        package = f" (package {line['package']})" if line["package"] else ""
        lines.append(f"    source    {line['source']}{package}")
        options = ", ".join(f"{k}={json.dumps(v)}" for k, v in line["options"].items())
        lines.append(f"    options   {options or 'none'}")
    return "\n".join(lines)


_TOLD = ("rows", "kept", "unit", "size")


def _text(result: dict[str, Any]) -> str:
    """The result as a short table."""
    lines = [f"rows {result['rows']:>12,}", f"kept {result['kept']:>12,}"]
    lines += [f"  {reason:<22} {count:>10,}" for reason, count in result["removed"].items()]
    for name, value in result["facts"].items():
        if name not in _TOLD and isinstance(value, bool | int | float | str):
            lines.append(f"{name:<24} {value}")
    return "\n".join([*lines, f"selection: {result['selection']}", f"data: {result['data']}"])
