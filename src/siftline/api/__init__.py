"""The functions that `import siftline` gives: one call on data of any form, one result.

Each runs a stage's own code, as a recipe and the verbs do, on a pool made of what was given; so all
three decide alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.api.frames import Given, given, in_memory, read_whole
from siftline.api.judge import LINES, QUARANTINED, UNREAD, Judged, Read, judge
from siftline.api.output import FACT_NAMES, Decided, in_tables, unread_lines
from siftline.api.result import Result
from siftline.config import nearest
from siftline.deduplication.engine import Deduplicated, Settings, deduplicate
from siftline.deduplication.files import open_read
from siftline.deduplication.output import summary
from siftline.ingest.files import InputFile, input_files
from siftline.ingest.plans import answer_columns, plan_for, text_column
from siftline.ingest.records import Fault, columns_of, read_records
from siftline.ingest.source import Holds, Layout, Source
from siftline.kernels.sets.keepers import Keep
from siftline.rows.ledger import KEPT, REMOVED

__all__ = ["Result", "decontaminate", "dedup", "quality", "verify"]


def dedup(
    data: Any,
    *,
    keep: str = "first",
    threshold: float | None = None,
    numbers: str = "exact",
    text: str | None = None,
    columns: Mapping[str, str] | None = None,
    layout: Layout = "auto",
    **options: Any,
) -> Result:
    """Removes exact and near duplicates.

    Of conversations, a row goes only where its prompt and its response both are similar to those of
    a row that stays; another response to the same prompt stays. That is the stage `duplicates`, and
    decides as in a recipe. Plain texts (or one column, by `text`) are compared on word 5-grams, as
    `siftline dedup` does it.

    Args:
        data: A frame, a datasets.Dataset or DatasetDict, a list of dicts, a path or paths.
        keep: Which copy stays. Of conversations "first" is the smallest id, whatever the order of
            the rows; of identical rows and of texts it is the first row. Else "longest",
            "score:COLUMN", "source:source=A,B", or for texts "none".
        threshold: Jaccard similarity in (0, 1] from which rows are duplicates; 0.8 by default.
        numbers: "exact" compares only conversations with the same numbers, "any" all.
        text: Column to compare as plain text.
        columns: Field -> column, where a column has another name than its field.
        layout: How rows hold a conversation; by default found by the columns.
        **options: Further options of the stage `duplicates`, or of texts (ngram, unit, num_perm).

    Returns:
        The rows that stayed and those that went.

    Raises:
        ValueError: if the data or an option can't be read.

    Example:
        >>> import siftline as sl
        >>> rows = [{"prompt": "What is a pear?", "completion": "A fruit of a tree."}] * 2
        >>> sl.dedup(rows)
        <duplicates: 2 rows, 1 kept, 1 removed (exact_duplicate 1)>
    """
    source = _source(columns, layout)
    given_threshold = {} if threshold is None else {"threshold": threshold}
    with TemporaryDirectory(prefix="siftline-") as folder:
        scratch = Path(folder)
        rows = given(data, scratch / "given", source)
        column = text or _text_column(rows)
        if column is not None:
            return _texts(rows, column, keep, {**given_threshold, **options}, scratch)
        chosen = {"keep": keep, "numbers": numbers, **given_threshold, **options}
        return _decided("duplicates", chosen, rows, scratch)


def decontaminate(
    data: Any,
    against: Any,
    *,
    columns: Mapping[str, str] | None = None,
    layout: Layout = "auto",
    holds: Holds = "responses",
    **options: Any,
) -> Result:
    """Removes rows that overlap rows of another set: the same prompt, near copies, shared n-grams.

    It is the stage `decontamination`, and decides as in a recipe with a test set.

    Args:
        data: A frame, a datasets.Dataset or DatasetDict, a list of dicts, a path or paths.
        against: The rows that must not be there, in any of these forms, or a dict of several by
            name. Their layout is found by their own columns.
        columns: Field -> column of `data`, where a column has another name than its field.
        layout: How rows of `data` hold a conversation; by default found by the columns.
        holds: "prompts" where `data` has no responses.
        **options: Of the stage: ngram (words, 13), min_share (0.5), near (0.8), common (10).

    Returns:
        The rows that stayed and those that went; `sift_matched_row` names a row of `against`.

    Raises:
        ValueError: if the data or an option can't be read.

    Example:
        >>> import siftline as sl
        >>> train = [{"prompt": "Name a fruit.", "completion": "A pear."}]
        >>> sl.decontaminate(train, against=[{"prompt": "name a fruit", "completion": "Apple"}])
        <decontamination: 1 rows, 1 removed (overlaps_test 1)>
    """
    with TemporaryDirectory(prefix="siftline-") as folder:
        scratch = Path(folder)
        rows = given(data, scratch / "given", _source(columns, layout))
        sets = {
            name: given(those, scratch / "against" / name, _source(None, "auto"), name)
            for name, those in _sets(against).items()
        }
        sets = {
            name: replace(those, sources=as_set(those.sources, those.columns))
            for name, those in sets.items()
        }
        return _decided("decontamination", options, rows, scratch, sets, holds)


def quality(
    data: Any,
    *,
    languages: Any = None,
    columns: Mapping[str, str] | None = None,
    layout: Layout = "auto",
    **options: Any,
) -> Result:
    """Removes rows whose text is of another language, repeats itself, or breaks another rule.

    It is the stage `quality_rules`, and decides as in a recipe. Needs the extra `quality`.

    Args:
        data: A frame, a datasets.Dataset or DatasetDict, a list of dicts, a path or paths.
        languages: Codes of the languages to keep (ISO 639-1), each held to the default rules; or a
            dict of rules by code, which keeps other languages, too. By default English is held to
            rules and all languages stay.
        columns: Field -> column, where a column has another name than its field.
        layout: How rows hold a conversation; by default found by the columns.
        **options: Of the stage: text ("response", "prompt" or "both"), keep, words (a file), …

    Returns:
        The rows that stayed and those that went.

    Raises:
        ValueError: if the data or an option can't be read, or a library is not installed.

    Example:
        >>> import siftline as sl
        >>> answer = "Der Zug nach Hamburg fährt heute leider erst am späten Abend von Gleis zwei."
        >>> rows = [{"prompt": "Wann fährt der nächste Zug nach Hamburg?", "completion": answer}]
        >>> sl.quality(rows, languages={"en"})
        <quality_rules: 1 rows, 1 removed (other_language 1)>
    """
    chosen = {**language_options(languages), **options}
    return _simple("quality_rules", chosen, data, columns, layout)


def language_options(languages: Any) -> dict[str, Any]:
    """Options of the stage `quality_rules` for the languages that `quality` takes."""
    if languages is None:
        return {}
    if isinstance(languages, Mapping):
        return {"languages": dict(languages)}
    codes = [languages] if isinstance(languages, str) else sorted(languages)
    return {"languages": {code: {} for code in codes}, "keep": codes}


def verify(
    data: Any,
    verifier: str = "math",
    *,
    columns: Mapping[str, str] | None = None,
    layout: Layout = "auto",
    **options: Any,
) -> Result:
    """Removes rows whose response contradicts, or never reaches, their independent answer.

    It is the stage `verify`, and decides as in a recipe. A row without an answer stays, and
    `summary()["vacuous"]` says where none had one.

    Args:
        data: A frame, a datasets.Dataset or DatasetDict, a list of dicts, a path or paths.
        verifier: "math", "exact", "verbatim", "choice", "regex", "json_schema", "code",
            "instructions", or package.module:attribute.
        columns: Field -> column, where a column has another name than its field, such as
            {"answer": "gold"}. Without it, a column answer, ground_truth, final_answer,
            reference_answer or gold holds the answers.
        layout: How rows hold a conversation; by default found by the columns.
        **options: Of the stage: no_final_answer and open, each "remove" or "keep".

    Returns:
        The rows that stayed, those that went, and those that the verifier failed on.

    Raises:
        ValueError: if the data or an option can't be read.

    Example:
        >>> import siftline as sl
        >>> said = ["The answer is 4.", "The answer is 5."]
        >>> rows = [{"prompt": "2 + 2?", "completion": text, "answer": "4"} for text in said]
        >>> sl.verify(rows, verifier="math")
        <verify: 2 rows, 1 kept, 1 removed (wrong_answer 1)>
    """
    with TemporaryDirectory(prefix="siftline-") as folder:
        scratch = Path(folder)
        rows = given(data, scratch / "given", _source(columns, layout))
        rows = replace(rows, sources=with_answers(rows.sources, rows.columns))
        return _decided("verify", {"verifier": verifier, **options}, rows, scratch)


def with_answers(sources: Sequence[Source], columns: Sequence[str] = ()) -> tuple[Source, ...]:
    """Sources whose reference answers are read though nobody named their column.

    A recipe takes answers from a column only where it is told to. Whoever asks for answers to be
    verified has told.
    """
    found = []
    for source in sources:
        there = columns or columns_of(input_files([source])[0])
        found.append(replace(source, columns=answer_columns(source, there)))
    return tuple(found)


def as_set(sources: Sequence[Source], columns: Sequence[str] = ()) -> tuple[Source, ...]:
    """Sources of a set to compare with; of two columns that could be the response, one is it."""
    found = []
    for source in sources:
        there = list(columns or columns_of(input_files([source])[0]))
        try:
            plan_for(source, there, "", "either")
        except ValueError:
            source = replace(source, columns=answer_columns(source, there))
        found.append(source)
    return tuple(found)


def _simple(
    kind: str,
    options: Mapping[str, Any],
    data: Any,
    columns: Mapping[str, str] | None,
    layout: Layout,
) -> Result:
    with TemporaryDirectory(prefix="siftline-") as folder:
        scratch = Path(folder)
        rows = given(data, scratch / "given", _source(columns, layout))
        return _decided(kind, options, rows, scratch)


def _source(columns: Mapping[str, str] | None, layout: Layout) -> Source:
    return Source("given", layout=layout, columns=dict(columns or {}))


def _sets(against: Any) -> dict[str, Any]:
    """Sets by name; a DatasetDict is a set by itself, as is a list."""
    named = isinstance(against, dict) and type(against).__name__ != "DatasetDict"
    return {str(k): v for k, v in against.items()} if named else {"test": against}


def _decided(
    kind: str,
    options: Mapping[str, Any],
    rows: Given,
    scratch: Path,
    sets: Mapping[str, Given] | None = None,
    holds: Holds = "responses",
) -> Result:
    against = {name: those.sources for name, those in (sets or {}).items()}
    judged = judge(kind, options, rows.sources, scratch / "root", against=against, holds=holds)
    others = [
        read_whole(those, read, scratch / "whole" / name)
        for (name, those), read in zip((sets or {}).items(), judged.sets, strict=True)
    ]
    rows = read_whole(rows, judged, scratch / "whole" / "rows")
    assert rows.rows == judged.lines.height, f"{judged.lines.height} of {rows.rows} rows judged"
    names = tuple(name for other in others for name in other.names)
    return Result(Decided(kind, judged, rows.names, names), rows, tuple(others))


def _text_column(rows: Given) -> str | None:
    """The column to compare as plain text; None where rows hold conversations."""
    (source, *_), columns = rows.sources, rows.columns
    if not columns:
        columns = tuple(columns_of(next(iter(input_files(rows.sources)))))
    column = text_column(source, columns)
    return column if column in columns else None  # ingestion says what is missing


def _texts(
    rows: Given, column: str, keep: str, options: Mapping[str, Any], scratch: Path
) -> Result:
    """Texts are decided about by the engine of `siftline dedup`."""
    policy = Keep.parse(keep)
    settings = _built(Settings, options)
    if rows.take is None:
        read, quarantine = _scanned(input_files(rows.sources))
        opened = open_read(read.files, unread_lines(read), scratch / "open", FACT_NAMES)
        rows = in_memory(opened, in_tables(read))
    else:
        count = rows.rows or 0
        lines = pl.DataFrame({"file": [0] * count, "line": np.arange(1, count + 1)})
        read = Read((), lines.with_columns(outcome=pl.lit(KEPT)))
        quarantine = pl.DataFrame(schema=QUARANTINED)
    assert rows.column is not None
    for name in (column, policy.column):
        if name is not None and name not in rows.columns:
            raise ValueError(f"no column {name!r}, only {', '.join(rows.columns)}: name another")
    texts = rows.column(column)
    priority = None
    if policy.ordered:
        more = rows.column(policy.column) if policy.column else None
        priority = policy.priority(_one(texts), None if more is None else _one(more))
    found = deduplicate(texts, settings, priority=priority, drop_all=policy.policy == "none")
    lines = _lines_of(found, read.lines, in_tables(read), settings.threshold)
    judged = Judged(read.files, lines, facts=summary(found), quarantine=quarantine)
    return Result(Decided("duplicates", judged, rows.names), rows)


def _built(cls: type[Settings], options: Mapping[str, Any]) -> Settings:
    known = [field.name for field in fields(cls)]
    for name in options:
        if name not in known:
            raise ValueError(f"dedup of texts has no option {name!r}: {nearest(name, known)}")
    return cls(**options)


def _one(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _scanned(files: Sequence[InputFile]) -> tuple[Read, pl.DataFrame]:
    """Which lines of some files hold records; and the others."""
    lines: list[tuple[int, int, str, str | None]] = []
    lost: list[tuple[str, int, str, str]] = []
    for k, file in enumerate(files):
        for item in read_records(file):
            fault = item if isinstance(item, Fault) else None
            told = (UNREAD, fault.reason) if fault else (KEPT, None)
            lines.append((k, item.line, *told))
            if fault:
                lost.append((file.name, fault.line, fault.reason, fault.excerpt))
    names = ["file", "line", "outcome", "reason"]
    read = pl.DataFrame(lines, [(n, LINES[n]) for n in names], orient="row")
    names = ["file", "line", "reason", "excerpt"]
    quarantine = pl.DataFrame(lost, [(n, QUARANTINED[n]) for n in names], orient="row")
    return Read(tuple(files), read), quarantine


def _lines_of(
    found: Deduplicated, lines: pl.DataFrame, there: np.ndarray, threshold: float
) -> pl.DataFrame:
    """Decisions about texts, one line a row; `there` says which rows have texts."""
    gone = np.flatnonzero(~found.kept)
    places = np.flatnonzero(there)
    exact = found.exact[gone]
    columns = {
        "place": places[gone],
        "outcome_then": [REMOVED] * len(gone),
        "reason_then": np.where(exact, "exact_duplicate", found.reason).tolist(),
        "value": found.similarity[gone],
        "threshold": np.where(exact, 1.0, threshold),
        "matched": places[found.matched[gone]],
    }
    types = {"outcome_then": pl.String, "reason_then": pl.String}
    decided = pl.DataFrame(columns, schema_overrides=types).cast({"place": pl.UInt32})
    if "reason" not in lines.columns:
        lines = lines.with_columns(reason=pl.lit(None, pl.String))
    joined = lines.with_row_index("place").join(
        decided, on="place", how="left", maintain_order="left"
    )
    joined = joined.with_columns(
        *(pl.lit(None, pl.String).alias(name) for name in ("id", "matched_id")),
        outcome=pl.coalesce("outcome_then", "outcome"),
        reason=pl.coalesce("reason_then", "reason"),
    )
    return joined.select(pl.col(name).cast(kind) for name, kind in LINES.items())
