"""`siftline dedup`: near duplicates out of plain files, without a recipe."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from siftline.cli.options import json_option, make_tracker


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--text-column", default="text", show_default=True, help="Column of plain texts.")
@click.option("--prompt-column", help="Column of the prompts of conversations.")
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

    Writes the kept rows to data/ with sift_cluster_size, and the others to removed/ with the
    reason, the row that each was removed for (as FILE:ROW, from 1) and their similarity. A row goes
    only for a kept row that it was verified similar to. Rows are written with the values that were
    read, those of all files with one schema; files whose columns differ in kind are refused.

    Files that hold conversations in a layout that a recipe finds by their columns, or in the
    columns named by --prompt-column and --response-column or --messages-column, are decided about
    by the gate duplicates of a recipe: a row goes only where prompt and response both are similar,
    on character shingles. Another response to a prompt is an alternative and stays, marked with the
    same sift_prompt_group; prompts whose answers contradict are listed in conflicts/; what can't be
    read goes to quarantine/. Of copies the smallest id stays, whatever the order of the rows, and
    of identical rows the first. A row of 60 + 60 words takes about 3 kB of memory and as much again
    to decide, and 2 million rows are the limit.

    Other files hold texts, in --text-column. Texts are compared on word shingles, without case,
    punctuation and typography; operators and other signs count. Composed and decomposed letters
    (NFC, NFD) are one. Their engine holds a few numbers a row and spills to disk; a line that can't
    be read is refused before anything is done. With --index, changes.parquet lists rows of earlier
    runs whose decision these turned over; clusters are those that rows of this run are in.

    sift_cluster_size counts a kept row and the rows removed for it, so that sizes add up to the
    number of rows (unless --keep none drops every copy). FineWeb2 counts connected components: of a
    chain A~B~C, where C is not similar to A, it makes one cluster of 3; here A stays with a size of
    2, and C with 1.
    """
    conversations = any(given[name] for name in _CONVERSATION) or _hold_conversations(files)
    result = _conversations(files, given) if conversations else _texts(files, given)
    click.echo(json.dumps(result) if as_json else _text(result))


_CONVERSATION = ("prompt_column", "response_column", "messages_column", "answer_column", "numbers")
_OF_TEXTS = ("text_column", "unit", "bands", "target", "embeddings", "nearest", "index")


def _stated(name: str) -> bool:
    """Whether an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source == ParameterSource.COMMANDLINE


def _texts(files: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    from siftline.deduplication.engine import Settings
    from siftline.deduplication.run import Job, dedup_files
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
    keep = Keep.parse(given["keep"])
    more = {name: given[name] for name in ("index", "target", "rehydrate", "embeddings", "nearest")}
    job = Job(files, given["out"].absolute(), given["text_column"], settings, keep, **more)
    return dedup_files(job, make_tracker)


def _hold_conversations(files: tuple[str, ...]) -> bool:
    """Whether the first file holds conversations; not asked where an option is for texts."""
    if any(_stated(name) for name in _OF_TEXTS) or _keeps_none():
        return False
    path = Path(files[0])
    if path.suffix == ".parquet" and path.is_file():
        names = _parquet_columns(path)
    else:
        from siftline.ingest.files import input_files
        from siftline.ingest.records import columns_of
        from siftline.ingest.source import Source

        if "://" not in files[0] and not any(c in files[0] for c in ":*?[") and not path.exists():
            return False  # said where files are opened
        names = columns_of(input_files([Source(files[0])])[0])
    from siftline.ingest.plans import text_column
    from siftline.ingest.source import Source

    return text_column(Source(files[0]), names) is None


def _keeps_none() -> bool:
    """Whether --keep none asks for what only texts can have."""
    return bool(click.get_current_context().params["keep"] == "none")


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):  # said where files are opened
        return []


def _conversations(files: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    from siftline.cli.judge import judge_files
    from siftline.deduplication.engine import Clock
    from siftline.ingest.source import Source

    for name in _OF_TEXTS:
        if _stated(name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for texts, not for conversations: leave it out")
    if given["keep"] == "none":
        raise ValueError("keep=none is for texts: of conversations the first copy stays")
    columns = _columns(given)
    layout: Any = "auto"
    if set(columns) - {"answer"}:
        layout = "messages" if "messages" in columns else "prompt_completion"
    options = {
        "ngram": given["ngram"],
        "numbers": given["numbers"] or "exact",
        "keep": given["keep"],
        **({} if given["threshold"] is None else {"threshold": given["threshold"]}),
        **({"num_perm": given["num_perm"]} if _stated("num_perm") else {}),
    }
    sources = [Source(path, layout=layout, columns=columns) for path in files]
    clock = Clock()
    with clock.phase("all"):
        out = given["out"].absolute()
        result, decided = judge_files(
            "duplicates", options, sources, out, rehydrate=given["rehydrate"]
        )
    facts, lines = result.pop("facts"), decided.judged.lines
    read = lines.filter(lines["id"].is_not_null())
    kept = read.filter(outcome="kept")["id"].str.slice(0, 20)
    return {
        **result,
        "exact": result["reasons"].get("exact_duplicate", 0),
        "clusters": int((decided.sizes > 1).sum()),
        "pairs_verified": facts["candidate_pairs"],
        "threshold": decided.judged.options["threshold"],
        "prompts": read["id"].str.slice(0, 20).n_unique(),
        "alternatives": int(kept.is_duplicated().sum()),
        "conflicting_prompts": facts["conflicting_prompts"],
        "seconds": {name: round(value, 4) for name, value in clock.seconds.items()},
    }


def _columns(given: dict[str, Any]) -> dict[str, str]:
    """Field -> column, as the options name them.

    Raises:
        ValueError: if they name half of a conversation, or two.
    """
    named = {
        "prompt": given["prompt_column"],
        "completion": given["response_column"],
        "messages": given["messages_column"],
        "answer": given["answer_column"],
    }
    columns = {name: column for name, column in named.items() if column}
    if set(columns) - {"answer"} not in (set(), {"messages"}, {"prompt", "completion"}):
        raise ValueError(
            "conversations are --prompt-column and --response-column, or --messages-column: "
            f"give one of the two, not {', '.join(columns.values())}"
        )
    return columns


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
        from siftline.cli.judge import notes

        said = f"{result['alternatives']:,} rows share a prompt with another kept row"
        lines.insert(2, f"prompts   {result['prompts']:>12,}  {said}")
        lines.insert(3, f"conflicts {result['conflicting_prompts']:>12,}  prompts")
        faults = ", ".join(f"{count:,} {reason}" for reason, count in result["unreadable"].items())
        if faults:
            lines.insert(4, f"quarantined {result['quarantined']:>10,}  no conversation: {faults}")
        lines += notes(result)
    elif result["repeated_keys"]:
        lines.append(f"keys given twice, the last one read: {result['repeated_keys']:,}")
    if "retracted" in result:
        said = f"{result['retracted']:,} kept ones lost now, {result['restored']:,} came back"
        lines.insert(1, f"before    {result['rows_before']:>12,}  rows in the index: {said}")
    return "\n".join(lines)
