"""`siftline export`: a published version in the form of another trainer."""

import json
from pathlib import Path

import click

from siftline.commands.options import json_option


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
