"""Starting a recipe, and what is said of its newest version."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from siftline.commands.options import lines_beside_a_run
from siftline.workspace import Workspace

if TYPE_CHECKING:
    from siftline.recipe.parse import Recipe


def start(workspace: Workspace, recipe: "Recipe", overrides: Sequence[str], **options: Any) -> None:
    """Runs a recipe; raises ValueError with its reason where it fails."""
    from siftline.pipelines.execute import run_recipe

    with lines_beside_a_run() as say:
        outcome = run_recipe(workspace, recipe, overrides, say, **options)
    if not outcome.success:
        raise ValueError(outcome.error or f"run {outcome.run_id} failed: see `siftline ui`")


def summary(workspace: Workspace, recipe: "Recipe") -> dict[str, Any]:
    """Paths and numbers of the newest version of a recipe."""
    from siftline.rows.verified import AlteredError, read_hashed
    from siftline.stages.publish import newest

    folder = newest(workspace, recipe)
    rewrite = f"`siftline run {recipe.name}` writes it again"
    page = workspace.report(recipe.name) / f"{folder.name}.html"
    path = page.with_suffix(".json")
    if not path.exists():
        raise ValueError(f"version {folder.name} has no report yet: run the recipe to its end")
    numbers = read_hashed(path, "a report's numbers", rewrite)
    if numbers.get("version") != folder.name:
        raise AlteredError(f"{path} is not the report of version {folder.name}: {rewrite}")
    accuracy = {
        line["arm"]: {k: line[k] for k in ("accuracy", "low", "high", "seeds", "n", "at_floor")}
        for line in numbers["accuracy"] or []
        if line["level"] == "all"
    }
    return {
        "curated": str(folder),
        "is_latest": (folder.parent / "latest").resolve() == folder,
        "report": str(page),
        "inputs": numbers["inputs"],
        "rows": {stage.name: numbers["rows"][stage.name] for stage in recipe.stages},
        "accuracy": accuracy,
        "notes": numbers["notes"],
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a summary, as text or as one JSON object."""
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(funnel_text(result["rows"]))
    for arm, line in result["accuracy"].items():
        click.echo(accuracy_text(arm, line))
    for defect, line in result.get("planted", {}).items():
        shown = ", ".join(f"{k} {v}" for k, v in line.items())
        click.echo(f"planted {defect:<22} {shown}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    beside = "" if result["is_latest"] else " (beside `latest`: the recipe was changed for it)"
    click.echo(f"curated: {result['curated']}{beside}")
    click.echo(f"report:  {result['report']}")


def funnel_text(rows: dict[str, dict[str, int]]) -> str:
    """The funnel as a table."""
    columns = ("in", "added", "kept", "removed", "failed")
    width = max(len(name) for name in rows) + 1
    lines = ["".ljust(width) + "".join(f"{c:>9}" for c in columns)]
    lines += [
        name.ljust(width) + "".join(f"{counts[c]:>9,}" for c in columns)
        for name, counts in rows.items()
    ]
    return "\n".join(lines)


def accuracy_text(arm: str, line: dict[str, Any]) -> str:
    """One arm's accuracy with its interval."""
    floor = ", at the floor" if line["at_floor"] else ""
    seeds = f"{line['seeds']} seeds" if line["seeds"] > 1 else "1 run"
    share = f"{100 * line['accuracy']:5.1f} % ({100 * line['low']:.1f} to {100 * line['high']:.1f}"
    return f"accuracy {arm:<8} {share}; {line['n']} questions, {seeds}{floor})"
