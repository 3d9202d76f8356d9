"""`siftline dedup`: near duplicates out of plain files, without a recipe."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from siftline.cli.options import json_option, make_tracker


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--text-column", default="text", show_default=True, help="Column that is compared.")
@click.option(
    "--prompt-column", help="Compare conversations: a row goes only where prompt and response do."
)
@click.option("--response-column", help="Column of the responses to --prompt-column.")
@click.option("--messages-column", help="The conversations, as a list of messages.")
@click.option(
    "--answer-column",
    help="Reference answers: conversations whose answers contradict never remove each other.",
)
@click.option(
    "--numbers",
    type=click.Choice(["exact", "any"]),
    help="Compare only conversations with the same numbers, or any [default: exact]",
)
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
    "--nearest",
    type=click.Choice(["exact", "faiss"]),
    default="exact",
    show_default=True,
    help="How vectors are compared: exact, with all kept rows, a minute for 100,000 of 384 and a "
    "hundred for a million, its limit; faiss, with those in cells near by, a quarter of that at "
    "100,000 and less beyond, 10 million at most: may miss copies, but removes no row unverified.",
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
    """Remove near duplicates from files of any format a recipe's pool reads.

    Rows are written with the values that were read, those of all files with one schema; files whose
    columns differ in kind are refused before anything is done, as is a line that can't be read.
    Writes the kept rows to data/ with sift_cluster_size, and the others to removed/ with the
    reason, the row that each was removed for (as FILE:ROW, counted from 0) and their similarity. A
    row goes only for a kept row that it was verified similar to. With --index, changes.parquet
    lists rows of earlier runs whose decision these turned over; clusters are those that rows of
    this run are in.

    sift_cluster_size counts a kept row and the rows removed for it, so that sizes add up to the
    number of rows (unless --keep none drops every copy). FineWeb2 counts connected components: of a
    chain A~B~C, where C is not similar to A, it makes one cluster of 3; here A stays with a size of
    2, and C with 1.

    Texts are compared without case, punctuation and typography; operators and other signs count.
    Composed and decomposed letters (NFC, NFD) are one.

    With --prompt-column and --response-column, or --messages-column, rows are compared as the
    duplicates gate of a recipe does, on character shingles: another response to a prompt is an
    alternative and stays, marked with the same sift_prompt_group; prompts whose answers contradict
    are listed in conflicts/. The code is the gate's: Unicode is folded (NFKC), a row of 60 + 60
    words takes about 3 kB of memory and as much again to decide, and 2 million rows are the limit.
    Texts have an engine of their own, which holds a few numbers a row and spills to disk.
    """
    if any(given[name] for name in _CONVERSATION):
        result = _conversations(files, given)
        click.echo(json.dumps(result) if as_json else _text(result))
        return
    from siftline.dedup.engine import Settings
    from siftline.dedup.run import Job, dedup_files
    from siftline.kernels.sets.keepers import Keep

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
    more = {name: given[name] for name in ("index", "target", "rehydrate", "embeddings", "nearest")}
    job = Job(files, out, given["text_column"], settings, keep, **more)
    result = dedup_files(job, make_tracker)
    click.echo(json.dumps(result) if as_json else _text(result))


_CONVERSATION = ("prompt_column", "response_column", "messages_column", "answer_column", "numbers")
_OF_TEXTS = ("text_column", "unit", "bands", "target", "embeddings", "nearest", "index")


def _conversations(files: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    from siftline.cli.dedup_conversations import Conversations, dedup_conversations
    from siftline.kernels.sets.keepers import Keep
    from siftline.stages.duplicates.decide import Duplicates

    context = click.get_current_context()
    for name in _OF_TEXTS:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for texts, not for conversations: leave it out")
    named = {
        "prompt": given["prompt_column"],
        "completion": given["response_column"],
        "messages": given["messages_column"],
        "answer": given["answer_column"],
    }
    options = {"ngram": given["ngram"], "numbers": given["numbers"] or "exact"}
    if given["threshold"] is not None:
        options["threshold"] = given["threshold"]
    if context.get_parameter_source("num_perm") == ParameterSource.COMMANDLINE:
        options["num_perm"] = given["num_perm"]
    job = Conversations(
        files,
        given["out"].absolute(),
        {name: column for name, column in named.items() if column},
        Duplicates(**options),
        Keep.parse(given["keep"]),
        given["rehydrate"],
    )
    return dedup_conversations(job, make_tracker)


def _text(result: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in result["seconds"].items())
    same = "the same conversation" if "prompts" in result else "byte for byte"
    lines = [
        f"rows      {result['rows']:>12,}",
        f"kept      {result['kept']:>12,}",
        f"removed   {result['removed']:>12,}  {result['exact']:,} of them {same}",
        f"clusters  {result['clusters']:>12,}",
        f"verified  {result['pairs_verified']:>12,}  pairs",
        f"seconds   {seconds}",
        f"out: {result['out']}",
    ]
    if "prompts" in result:
        said = f"{result['alternatives']:,} rows share a prompt with another kept row"
        lines.insert(2, f"prompts   {result['prompts']:>12,}  {said}")
        lines.insert(3, f"conflicts {result['conflicting_prompts']:>12,}  prompts")
        faults = ", ".join(f"{count:,} {reason}" for reason, count in result["unreadable"].items())
        if faults:
            lines.insert(4, f"no conversation, so kept: {faults}")
    if result["repeated_keys"]:
        lines.append(f"keys given twice, the last one read: {result['repeated_keys']:,}")
    if "retracted" in result:
        said = f"{result['retracted']:,} kept ones lost now, {result['restored']:,} came back"
        lines.insert(1, f"before    {result['rows_before']:>12,}  rows in the index: {said}")
    return "\n".join(lines)
