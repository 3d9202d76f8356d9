"""`siftline dedup`: near duplicates out of plain files, without a recipe."""

import json
from pathlib import Path
from typing import Any

import click

from siftline.commands.options import json_option, make_tracker


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--text-column", default="text", show_default=True, help="Column that is compared.")
@click.option(
    "--threshold",
    type=float,
    help="Similarity from which rows are duplicates [default: 0.8 of shingles, 0.95 of embeddings]",
)
@click.option(
    "--keep",
    default="first",
    show_default=True,
    metavar="POLICY",
    help="Which copy stays: first, longest, none, score:COLUMN (the highest) or "
    "source:COLUMN=A,B,... (the source named first).",
)
@click.option("--ngram", default=5, show_default=True, help="Units of a shingle.")
@click.option(
    "--unit",
    type=click.Choice(["word", "char"]),
    default="word",
    show_default=True,
    help="What shingles are made of; char suits texts of a sentence.",
)
@click.option(
    "--num-perm", default=128, show_default=True, help="Most slots of a MinHash signature."
)
@click.option(
    "--bands",
    type=click.Choice(["recall", "datasketch"]),
    default="recall",
    show_default=True,
    help="Bands that find 99 % of pairs 0.05 above the threshold, or datasketch's choice.",
)
@click.option(
    "--target",
    type=int,
    help="Most rows to keep: the highest threshold down to --threshold that keeps no more.",
)
@click.option(
    "--embeddings",
    metavar="COLUMN|FILE.npy",
    help="Compare these vectors by cosine similarity, not the texts.",
)
@click.option(
    "--rehydrate",
    is_flag=True,
    help="Add sift_weight: how often FineWeb2 would repeat a row of that cluster size.",
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    help="Folder that remembers rows: new ones are compared with those of earlier runs.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for data/ and removed/; new or empty.",
)
@json_option
def dedup(files: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Remove near duplicates from Parquet or JSONL files.

    Writes the kept rows to data/ with sift_cluster_size, and the others to removed/ with the
    reason, the row that each was removed for (as FILE:ROW, counted from 0) and their similarity. A
    row goes only for a kept row that it was verified similar to. With --index, changes.parquet
    lists rows of earlier runs whose decision these turned over.
    """
    from siftline.dedup.keep import Keep
    from siftline.dedup.run import Job, dedup_files
    from siftline.dedup.settings import Settings

    threshold = given["threshold"]
    if threshold is None:
        threshold = 0.95 if given["embeddings"] else 0.8
    settings = Settings(
        threshold=threshold,
        ngram=given["ngram"],
        unit=given["unit"],
        num_perm=given["num_perm"],
        bands=given["bands"],
    )
    out: Path = given["out"].absolute()
    keep = Keep.parse(given["keep"])
    more = {name: given[name] for name in ("index", "target", "rehydrate", "embeddings")}
    job = Job(files, out, given["text_column"], settings, keep, **more)
    result = dedup_files(job, make_tracker)
    click.echo(json.dumps(result) if as_json else _text(result))


def _text(result: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in result["seconds"].items())
    lines = [
        f"rows      {result['rows']:>12,}",
        f"kept      {result['kept']:>12,}",
        f"removed   {result['removed']:>12,}  {result['exact']:,} of them byte for byte",
        f"clusters  {result['clusters']:>12,}",
        f"verified  {result['pairs_verified']:>12,}  pairs",
        f"seconds   {seconds}",
        f"out: {result['out']}",
    ]
    if "retracted" in result:
        said = f"{result['retracted']:,} kept ones lost now, {result['restored']:,} came back"
        lines.insert(1, f"before    {result['rows_before']:>12,}  rows in the index: {said}")
    return "\n".join(lines)
