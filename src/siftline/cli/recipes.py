"""Verbs on recipes: run, demo, plan, report, status, explain, ui, recipe."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.cli.options import (
    json_option,
    limit_options,
    limited,
    lines_beside_a_run,
    named_recipe,
    root_option,
    say,
    set_option,
)
from siftline.workspace import ROOT_VARIABLE, Workspace

if TYPE_CHECKING:
    from siftline.recipe.kinds import Stage
    from siftline.recipe.parse import Recipe
    from siftline.rows.ledger import StageOutput


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


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--select", help="Dagster asset selection; by default everything.")
@click.option("--workers", default=2, show_default=True, help="Model steps at a time.")
@limit_options
@json_option
def run(
    recipe: str,
    root: Path,
    overrides: tuple[str, ...],
    select: str | None,
    workers: int,
    max_draws: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Run RECIPE, a name or a YAML file, from raw rows to the report."""
    changed = limited(recipe, overrides, max_draws, max_tokens)
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, changed)
    start(workspace, loaded, changed, workers=workers, select=select)
    if select is None:
        show(summary(workspace, loaded), as_json)


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
    from siftline.recipe.parse import find

    changed = [*overrides, *([f"models.base.engine={engine}"] if engine != "transformers" else [])]
    workspace, loaded = Workspace(root.absolute()), find("demo", changed)
    start(workspace, loaded, changed, workers=workers)
    result = audited(workspace, loaded, summary(workspace, loaded))
    show(result, as_json=False)
    click.echo(json.dumps(result))


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--workers", default=2, show_default=True, help="Model steps at a time.")
@limit_options
@json_option
def plan(
    recipe: str,
    root: Path,
    overrides: tuple[str, ...],
    workers: int,
    max_draws: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Say what RECIPE's rejection sampling will cost, from its pilot.

    Runs the stages before it where they have not run, and draws the pilot; its draws are kept and
    count. Without --max-draws and --max-tokens it says what meeting the targets takes.
    """
    from siftline.stages.rejection_sampling.run import plan_stage, sampling_stages
    from siftline.stages.run import outputs_so_far

    changed = limited(recipe, overrides, max_draws, max_tokens)
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, changed)
    names = sampling_stages(loaded)
    if not names:
        raise ValueError(f"recipe {loaded.name!r} has no rejection_sampling stage to plan")
    order = [stage.name for stage in loaded.stages]
    before = order[: order.index(names[0])]
    done = [stage.name for stage, _ in outputs_so_far(workspace, loaded)]
    if not before or before[-1] not in done:
        stage = f'key:"{loaded.name}/{names[0]}"'
        start(workspace, loaded, changed, workers=workers, select=f"+{stage} and not {stage}")
    for later in names[1:]:
        say(f"{later}: can be planned when {names[0]} has run")
    said = plan_stage(workspace, loaded, names[0], say)
    if as_json:
        click.echo(json.dumps({"stage": names[0], **said.as_json()}))
        return
    click.echo(f"{names[0]}: {said}")


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--planted", is_flag=True, help="Add what a generator planted and gates caught.")
@json_option
def report(
    recipe: str, root: Path, overrides: tuple[str, ...], planted: bool, as_json: bool
) -> None:
    """Show the funnel, accuracy and report page of RECIPE's newest version."""
    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, overrides)
    result = summary(workspace, loaded)
    if planted:
        from siftline.demo.summary import audited

        result = audited(workspace, loaded, result)
    show(result, as_json)


@click.command()
@root_option
@json_option
def status(root: Path, as_json: bool) -> None:
    """Show what is under ROOT: pools, stages, score coverage, published versions."""
    from siftline.stages.status import coverage_text, describe, pool_lines

    said = describe(Workspace(root.absolute()))
    if as_json:
        click.echo(json.dumps(said))
        return
    for line in pool_lines(said):
        click.echo(line)
    for line in coverage_text(said):
        click.echo(line)
    for recipe in said["recipes"]:
        click.echo(f"recipe {recipe['name']}: {recipe['stages_done']} of {recipe['stages']} stages")
        if recipe["rows"]:
            click.echo(funnel_text(recipe["rows"]))
        for version in recipe["versions"]:
            click.echo(f"curated {version}")
    for name, error in said["broken_recipes"].items():
        say(f"recipe {name} is not loaded: {error}")
    known = {recipe["name"] for recipe in said["recipes"]} | set(said["broken_recipes"])
    for folder in sorted(Workspace(root.absolute()).root.glob("curated/*")):
        if folder.name not in known:
            say(f"curated/{folder.name}: set SIFTLINE_RECIPES to its recipe's folder to see more")


def recipe_outputs(
    workspace: Workspace, overrides: Sequence[str], only: str | None
) -> "list[tuple[Recipe, list[tuple[Stage, StageOutput]]]]":
    """Every recipe whose pool is built, with the stages that have run."""
    from siftline.recipe.parse import recipe_files
    from siftline.stages.run import outputs_so_far

    found = []
    for name in [only] if only else sorted(recipe_files()):
        recipe = named_recipe(name, overrides if only else ())
        if (workspace.pool(recipe.pool.name) / "manifest.json").exists():
            found.append((recipe, outputs_so_far(workspace, recipe)))
    return found


@click.command()
@click.argument("identity", metavar="ID")
@root_option
@click.option("--recipe", help="Only this recipe, a name or a YAML file.")
@set_option
@json_option
def explain(
    identity: str, root: Path, recipe: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Tell the whole story of a row: ID is its id (8 digits or more), or FILE:LINE."""
    from siftline.report.story import explain as tell

    if overrides and recipe is None:
        raise ValueError("--set changes a recipe: name it with --recipe")
    workspace = Workspace(root.absolute())
    stories = tell(workspace, identity, recipe_outputs(workspace, overrides, recipe))
    if as_json:
        told = [
            {"of": title, "chapters": [vars(chapter) for chapter in chapters]}
            for title, chapters in stories
        ]
        click.echo(json.dumps(told))
        return
    if recipe is None and any(title.startswith("pool ") for title, _ in stories):
        say("a recipe of your own is told with --recipe FILE, or its folder in SIFTLINE_RECIPES")
    for title, chapters in stories:
        click.echo(title)
        for chapter in chapters:
            click.echo(f"  {chapter}")


@click.command()
@root_option
@click.option("--port", default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(root: Path, port: int, host: str) -> None:
    """Serve the Dagster UI on ROOT."""
    from siftline.pipelines.execute import prepare_home

    workspace = Workspace(root.absolute())
    environment = os.environ | {
        "DAGSTER_HOME": str(prepare_home(workspace)),
        ROOT_VARIABLE: str(workspace.root),
    }
    here = Path("workspace.yaml")
    target = ["-w", str(here)] if here.exists() else ["-m", "siftline.definitions"]
    command = [sys.executable, "-m", "dagster", "dev", *target, "-h", host, "-p", str(port)]
    os.execve(sys.executable, command, environment)


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
