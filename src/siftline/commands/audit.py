"""`siftline audit`: how many of the rows that a stage removed should have stayed."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.commands.options import json_option, named_recipe, root_option, say, set_option
from siftline.workspace import Workspace

if TYPE_CHECKING:
    import polars as pl


@click.command()
@click.argument("recipe")
@root_option
@set_option
@click.option("--stage", required=True, help="The stage whose removed rows are drawn.")
@click.option("-n", "count", default=50, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    help="CSV file of rows and labels [default: ROOT/audits/RECIPE/STAGE-VERSION-SEED.csv]",
)
@click.option("--label", is_flag=True, help="Show each row that has no label, and ask for it.")
@json_option
def audit(
    recipe: str,
    root: Path,
    overrides: tuple[str, ...],
    stage: str,
    count: int,
    seed: int,
    sheet: Path | None,
    label: bool,
    as_json: bool,
) -> None:
    """Draw removed rows of RECIPE's STAGE to label, and give the false-drop rate.

    Fill the sheet's first column with right (removing it was right), wrong or unsure, or answer
    with --label, and call the command again. More rows (-n) keep the labels there are.
    """
    from siftline.stages import audit as sheets
    from siftline.stages.publish import final_context
    from siftline.stages.run import outputs_so_far

    workspace, loaded = Workspace(root.absolute()), named_recipe(recipe, overrides)
    wanted = loaded.stage(stage)
    done = outputs_so_far(workspace, loaded)
    found = {part.name: output for part, output in done}
    if stage not in found:
        raise ValueError(f"stage {stage} of {loaded.name} has not run with these settings: run it")
    # Other settings remove other rows: labels of theirs are no labels of these.
    name = f"{stage}-{found[stage].manifest.version[:12]}-{seed}.csv"
    path = sheet or workspace.root / "audits" / loaded.name / name
    context = final_context(workspace, loaded, done)
    drawn = sheets.draw(context, wanted, found[stage], count, seed)
    labels = sheets.read_labels(path) if path.exists() else {}
    lost = sorted(set(labels) - set(drawn["id"].to_list()))
    if lost:
        raise ValueError(
            f"{path} has labels of {len(lost)} rows that this call does not draw, first "
            f"{lost[0][:12]}: give a larger -n, or another --sheet"
        )
    sheets.write_sheet(path, drawn, labels)
    if label:
        _ask(drawn, labels, lambda: sheets.write_sheet(path, drawn, labels))
    result = sheets.rate(drawn, labels, found[stage].accounting.removed)
    _show({"stage": stage, "sheet": str(path), **result}, as_json)


def _ask(drawn: "pl.DataFrame", labels: dict[str, str], save: Any) -> None:
    if not sys.stdin.isatty():
        raise ValueError("--label asks on a terminal, and there is none: fill the sheet instead")
    known = {"r": "right", "w": "wrong", "u": "unsure"}
    todo = [line for line in drawn.to_dicts() if line["id"] not in labels]
    for i, line in enumerate(todo):
        for name, text in line.items():
            if text is not None:
                say(f"{name:>16}: {text}")
        choices = click.Choice([*known, "q"])
        said = click.prompt(
            f"{i + 1} of {len(todo)}. Removing it was right, wrong, unsure; q ends", type=choices
        )
        if said == "q":
            return
        labels[line["id"]] = known[said]
        save()


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"sheet: {result['sheet']}")
    click.echo(
        f"{result['removed']:,} removed by {result['stage']}, {result['drawn']} drawn, "
        f"{result['labelled']} labelled, {result['unsure']} unsure"
    )
    if result["rate"] is None:
        click.echo("no label yet: put right, wrong or unsure in the sheet's first column")
        return
    share = [f"{100 * result[name]:.1f}" for name in ("rate", "low", "high")]
    click.echo(f"false drops {share[0]} % ({share[1]} to {share[2]})")
    for reason, line in result["by_reason"].items():
        click.echo(f"  {reason}: {line['false_drops']} of {line['labelled']}")
