"""Verbs on published versions: `siftline export` and `siftline audit`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.cli.options import json_option, named_recipe, root_option, say, set_option
from siftline.workspace import Workspace

if TYPE_CHECKING:
    import polars as pl


@click.command()
@click.argument("folder", type=Path)
@click.option("--to", required=True, help="openai, llamafactory, axolotl, swift, verl, ...")
@click.option("--out", required=True, help="Folder to write; it must not exist.")
@json_option
def export(folder: Path, to: str, out: str, as_json: bool) -> None:
    """Write the version in FOLDER for another trainer, with the configuration it wants.

    FOLDER is curated/RECIPE/VERSION, or curated/RECIPE for its newest. TO is openai, llamafactory,
    axolotl, swift, verl, open-instruct or openrlhf. Rows for fine-tuning go to sft.jsonl, pairs to
    preferences.jsonl, verifiable prompts to rlvr.jsonl (Parquet for verl). The loss is on the last
    response of a row. Rows that the trainer has no place for are counted by reason and stand in
    left_out.jsonl.
    """
    from siftline.export.write import export as write

    done = write(folder, to, out)
    result = {
        "version": str(done.version),
        "out": str(done.out),
        "files": list(done.files),
        "rows": done.rows,
        "left_out": done.left_out,
        "not_trained_there": list(done.unknown),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for kind, count in done.rows.items():
        reasons = ", ".join(f"{n:,} {why}" for why, n in done.left_out.get(kind, {}).items())
        click.echo(f"{kind:<12} {count:>10,} rows" + (f"  left out: {reasons}" if reasons else ""))
    for kind in done.unknown:
        click.echo(f"{kind:<12}            {to} has no such training")
    click.echo(f"out: {done.out} ({', '.join(done.files)})")


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
