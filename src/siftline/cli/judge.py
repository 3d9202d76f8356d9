"""`siftline decontaminate`, `filter` and `verify`: a gate of a recipe, on plain files."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj, rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import click

from siftline.cli.options import json_option, make_tracker, reading_options, say, source_of

if TYPE_CHECKING:
    from siftline.api.output import Decided
    from siftline.ingest.source import Source

Command = TypeVar("Command", bound=Callable[..., Any])
STREAM = "-"
SCRATCH = ".scratch"


def _judging_options(command: Command) -> Command:
    """Adds FILE..., --out, --set, the options of reading and --json."""
    files = click.argument("files", metavar="FILE...", nargs=-1, required=True)
    out = click.option(
        "--out",
        metavar="FOLDER",
        help="New folder for data/ and removed/; - writes the kept rows to stdout as JSONL, and is "
        "what FILE - stands for.",
    )
    overrides = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="OPTION=VALUE",
        help="An option of the stage, as in a recipe.",
    )
    return files(out(overrides(reading_options(json_option(command)))))


@click.command()
@click.option(
    "--against",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Rows that must not be there, with the layout that their own columns tell; again.",
)
@_judging_options
def decontaminate(files: tuple[str, ...], against: tuple[str, ...], **given: Any) -> None:
    """Remove rows of FILE... that overlap rows of other files, such as a test set.

    A row goes where it has the prompt of such a row, a near copy of it, or at least half of its
    13-grams: the gate decontamination of a recipe, with its options by --set. Writes the kept rows
    to data/ and the others to removed/, each with the row it overlaps (as FILE:ROW, from 1). What
    can't be read goes to quarantine/. FILE - is JSONL on stdin.
    """
    from siftline.api import as_set
    from siftline.ingest.source import Source

    sets = {"test": as_set([Source(path) for path in against])}
    _judge("decontamination", {}, files, given, sets)


@click.command("filter")
@click.option(
    "--language",
    "languages",
    multiple=True,
    metavar="CODE",
    help="Keep texts of this language (ISO 639-1), held to the default rules; again.",
)
@click.option(
    "--text",
    type=click.Choice(["response", "prompt", "both"]),
    default="response",
    show_default=True,
    help="What is judged.",
)
@click.option("--words", metavar="FILE", help="Words that no text may have, one a line.")
@_judging_options
def filter_rows(
    files: tuple[str, ...],
    languages: tuple[str, ...],
    text: str,
    words: str | None,
    **given: Any,
) -> None:
    """Remove rows of FILE... whose text repeats itself, is of another language, or breaks a rule.

    The gate quality_rules of a recipe, with its options by --set. Needs the extra `quality`. Writes
    the kept rows to data/, and the others to removed/ with the rule, what it saw and its threshold.
    What can't be read goes to quarantine/. FILE - is JSONL on stdin.
    """
    options: dict[str, Any] = {"text": text, **({"words": words} if words else {})}
    if languages:
        options |= {"languages": {code: {} for code in languages}, "keep": list(languages)}
    _judge("quality_rules", options, files, given)


@click.command()
@click.option(
    "--verifier",
    default="math",
    show_default=True,
    help="math, exact, verbatim, choice, regex, json_schema, code, instructions, or "
    "package.module:attribute.",
)
@_judging_options
def verify(files: tuple[str, ...], verifier: str, **given: Any) -> None:
    """Remove rows of FILE... whose response contradicts, or never reaches, their answer.

    The gate verify of a recipe, with its options by --set. The answers stand in the column answer,
    ground_truth, final_answer, reference_answer or gold, or in another by --field answer=COLUMN.
    Rows without one stay. Writes the kept rows to data/, and the others to removed/ with the
    reason. Rows that the verifier failed on go to failed/, what can't be read to quarantine/. FILE
    - is JSONL on stdin.
    """
    _judge("verify", {"verifier": verifier}, files, given)


def _judge(
    kind: str,
    options: dict[str, Any],
    files: tuple[str, ...],
    given: dict[str, Any],
    sets: Mapping[str, Sequence["Source"]] | None = None,
) -> None:
    from siftline.config import override

    for assignment in given["overrides"]:
        override(options, assignment)
    out = given["out"] or (STREAM if files == (STREAM,) else None)
    if out is None:
        raise ValueError("--out is missing: name a new folder, or - for JSONL on stdout")
    with read_from(files) as paths:
        sources = [source_of(path, given) for path in paths]
        if kind == "verify":
            from siftline.api import with_answers

            sources = list(with_answers(sources))
        if out == STREAM:
            result = _to_stdout(kind, options, sources, sets)
        else:
            result = judge_files(kind, options, sources, Path(out).absolute(), sets)[0]
    shown = json.dumps(result) if given["as_json"] else _text(result)
    click.echo(shown, err=out == STREAM)


@contextmanager
def read_from(files: Sequence[str]) -> Iterator[list[str]]:
    """The files by path; what stands on stdin is written to one first."""
    if STREAM not in files:
        yield list(files)
        return
    if files.count(STREAM) > 1:
        raise ValueError("stdin can be read once: name - once")
    with TemporaryDirectory(prefix="siftline-") as folder:
        path = Path(folder) / "stdin.jsonl"
        with path.open("wb") as stream:
            copyfileobj(sys.stdin.buffer, stream)
        yield [str(path) if name == STREAM else name for name in files]


def judge_files(
    kind: str,
    options: Mapping[str, Any],
    sources: Sequence["Source"],
    out: Path,
    sets: Mapping[str, Sequence["Source"]] | None = None,
    rehydrate: bool = False,
) -> tuple[dict[str, Any], "Decided"]:
    """Runs one stage on files and writes what it decided.

    Args:
        kind: Of the stage.
        options: As a recipe states them.
        sources: The files and how they are read.
        out: Folder that the result is written to; new or empty.
        sets: Test sets by name.
        rehydrate: Of duplicates, say how often to repeat a row.

    Returns:
        The counts, and the decisions.

    Raises:
        ValueError: if a file or an option can't be read, or the folder is not empty.
    """
    from siftline.api.judge import judge
    from siftline.api.output import (
        FACT_NAMES,
        file_records,
        unread_lines,
        write_decided,
        write_records,
    )
    from siftline.deduplication.arrow import NoTableError
    from siftline.deduplication.files import ADDED, open_read
    from siftline.deduplication.output import claim
    from siftline.rows.shards import building

    claim(out)
    with building(out) as folder:
        scratch = folder / SCRATCH
        judged = judge(
            kind, options, sources, scratch, against=sets, make_tracker=make_tracker, emit=say
        )
        added = ADDED if kind == "duplicates" else FACT_NAMES
        decided = named(kind, judged)
        try:
            tables = open_read(judged.files, unread_lines(judged), scratch / "tables", added)
        except NoTableError as error:
            say(f"written as JSONL, for no table holds the rows: {error}")
            write_records(folder, file_records(judged), decided)
        else:
            write_decided(folder, tables, decided, make_tracker, rehydrate)
        rmtree(scratch)
    return {"out": str(out), **counts(decided)}, decided


def named(kind: str, judged: Any) -> "Decided":
    """Decisions with the names of the files."""
    from siftline.api.output import Decided
    from siftline.deduplication.files import shown

    names = tuple(map(shown, judged.files))
    others = tuple(shown(file) for read in judged.sets for file in read.files)
    return Decided(kind, judged, names, others)


def counts(decided: "Decided") -> dict[str, Any]:
    """What the verbs print: what became of how many rows, and the facts of the stage."""
    facts = {k: v for k, v in decided.judged.facts.items() if k not in ("removed", "rows")}
    return {**decided.counts(), "facts": facts}


def _to_stdout(
    kind: str,
    options: Mapping[str, Any],
    sources: Sequence["Source"],
    sets: Mapping[str, Sequence["Source"]] | None,
) -> dict[str, Any]:
    from siftline.api.judge import judge
    from siftline.api.output import write_jsonl

    with TemporaryDirectory(prefix="siftline-") as folder:
        judged = judge(kind, options, sources, Path(folder), against=sets, emit=say)
        write_jsonl(sys.stdout, judged)
    return {"out": STREAM, **counts(named(kind, judged))}


def _text(result: dict[str, Any]) -> str:
    lines = [f"{name:<12}{result[name]:>10,}" for name in ("rows", "kept", "removed")]
    lines += [f"  {reason:<24}{count:>8,}" for reason, count in result["reasons"].items()]
    lines += [
        f"{name:<12}{result[name]:>10,}" for name in ("failed", "quarantined") if result[name]
    ]
    lines += [f"  {reason:<24}{count:>8,}" for reason, count in result["unreadable"].items()]
    if result["facts"].get("vacuous"):
        lines.append("nothing was judged: no row had what this asks for")
    return "\n".join([*lines, *notes(result), f"out: {result['out']}"])


def notes(result: Mapping[str, Any]) -> list[str]:
    """What reading met with that is neither kept nor removed; one line each."""
    lines = []
    if result["labelled_bad"]:
        lines.append(f"labelled bad, so kept and not judged: {result['labelled_bad']:,}")
    aside = ", ".join(f"{name} ({count:,})" for name, count in result["set_aside"].items())
    if aside:
        lines.append(f"columns that were not read: {aside}")
    if result["repeated_keys"]:
        lines.append(f"keys given twice, the last one read: {result['repeated_keys']:,}")
    return lines
