"""Which layout a file has, and which of its columns are read as what.

A layout is decided once per file, from the columns its first records have, and a guess is never
made: no layout or several is an error that names the columns. Two rules rank them: a file with
chosen and rejected responses holds pairs, whatever stands beside them, and `text` counts only when
nothing else fits, because Alpaca files carry their rendered template in a column of that name.

A reference answer is taken only from a column mapped to `answer`, so that "independent of the
response" is always somebody's statement. A prompt without a response can't be mistaken: there the
column may go by one of the names in use.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from siftline.ingest.source import (
    ANSWERS,
    COMMON_FIELDS,
    FIELDS,
    LAYOUT_FIELDS,
    NAMES,
    Holds,
    Source,
)

_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question",),
    "pairs": ("chosen", "rejected"),
    "text": ("text",),
}
_PROMPT = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction",),
    "prompt_completion": ("prompt",),
    "question_answer": ("question",),
}
"""What a record without a response needs."""
RESPONSES = ("response", "answer", "solution")
_BY_NAME = ("conversation_id", "system", "tools", "history", "label", "reasoning")
"""Common fields whose columns need no mapping, because they mean the same in every such file."""
_ALSO = {
    "pairs": ("messages", "conversations", "instruction", "input", "question"),
    "messages": ("rejected",),
    "question_answer": ("rejected",),
}
"""Further fields of a layout: what the prompt of a pair, or a second response, may stand in."""


@dataclass(frozen=True)
class Plan:
    """How the records of one file are read.

    Attributes:
        source: The recipe's words on it.
        stem: Source name of rows that have no other.
        layout: The layout; never `auto`.
        holds: What the records are.
        names: Field -> the columns it may stand in, first come first taken.
        required: Fields a record must have a column of.
        nulls: Whether the file's nulls were written; those of tables fill what other rows have.
    """

    source: Source
    stem: str
    layout: str
    holds: Holds
    names: dict[str, tuple[str, ...]]
    required: tuple[str, ...]
    nulls: bool = False

    @cached_property
    def ignored(self) -> frozenset[str]:
        """Columns that the recipe sets aside."""
        return frozenset(self.source.set_aside)

    def columns(self, there: Iterable[str]) -> list[str]:
        """Those of the columns that are there that some field may stand in."""
        wanted = {name for names in self.names.values() for name in names}
        return [name for name in there if name in wanted]


def plan_for(
    source: Source,
    columns: list[str],
    stem: str,
    holds: Holds = "responses",
    *,
    nulls: bool = False,
) -> Plan:
    """Decides how a file with these columns is read.

    Raises:
        ValueError: if a mapped or needed column is missing, or no or several layouts fit. It names
            the columns seen; the caller adds the file.
    """
    seen = f"columns seen: {', '.join(columns) or 'none'}"
    for name, column in source.columns.items():
        if column not in columns:
            raise ValueError(f"no column {column!r}, which is mapped to {name!r}; {seen}")
    names = _names(source)
    layout, answered = _decide(source, names, columns, holds, seen)
    if layout == "text" and (
        source.instruction is not None or set(source.columns) & {"system", "tools"}
    ):
        raise ValueError("layout text has no prompt, so no instruction, system or tools")
    used = _used(source, layout, names)
    if layout == "question_answer":
        used = _with_one_response(source, used, columns, seen, answered)
    if not answered and "answer" not in source.columns:
        taken = {column for name in used if name != "answer" for column in used[name]}
        used["answer"] = tuple(c for c in ANSWERS if c not in taken | set(source.set_aside))
    _check_answer(source, layout, used, answered)
    required = _REQUIRED[layout]
    if not answered or holds != "responses":
        required = _PROMPT.get(layout, required)
    elif layout == "question_answer":
        required = (*required, "response")
    return Plan(source, stem, layout, holds, used, required, nulls)


def text_column(source: Source, columns: Sequence[str]) -> str | None:
    """The column of plain texts; None where records hold conversations.

    Args:
        source: What is said about the layout.
        columns: Those that are there.

    Raises:
        ValueError: if the columns fit several layouts.
    """
    column = source.columns.get("text", "text")
    if source.layout != "auto":
        return column if source.layout == "text" else None
    named = {name for field in FIELDS for name in (field, *NAMES.get(field, ()))}
    told = named - {"text", *COMMON_FIELDS}
    mapped = source.mapped_layout_fields() - {"text"}
    if not mapped and not told & set(columns):
        return column
    if column in columns and not mapped and not _holds_any(source, columns):
        return column
    return None


def _holds_any(source: Source, columns: Sequence[str]) -> bool:
    """Whether some layout but that of texts fits, answered or not."""
    there, names = set(columns), _names(source)

    def has(name: str) -> bool:
        return any(column in there for column in names[name])

    layouts = [name for name in LAYOUT_FIELDS if name != "text"]
    return any(_fits(name, has) for name in layouts)


_GOLD = ("answer", "ground_truth", "final_answer", "reference_answer", "gold")
"""Columns that hold answers to verify responses against, where none is mapped."""


def answer_columns(source: Source, columns: Sequence[str]) -> dict[str, str]:
    """What a source maps, and a column of reference answers where one can be read as that."""
    if "answer" in source.columns:
        return source.columns
    own = {"response": "response"} if "response" in columns and "question" in columns else {}
    for gold in (name for name in _GOLD if name in columns and name not in source.set_aside):
        for more in ({}, own):
            try:
                mapped = {**more, **source.columns, "answer": gold}
                plan_for(replace(source, columns=mapped), list(columns), "")
            except ValueError:
                continue
            return mapped
    return source.columns


def _names(source: Source) -> dict[str, tuple[str, ...]]:
    """The columns each field may stand in; a column that is mapped means nothing else."""
    mapped = {*source.columns.values(), *source.set_aside}
    names: dict[str, tuple[str, ...]] = {}
    for name in FIELDS:
        if name in source.columns:
            names[name] = (source.columns[name],)
        else:
            names[name] = tuple(c for c in NAMES.get(name, (name,)) if c not in mapped)
    return names


def _used(
    source: Source, layout: str, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The fields that a layout reads."""
    mapped = {f for f in COMMON_FIELDS if f in source.columns}
    if source.source is not None:
        mapped.discard("source")
    by_name: tuple[str, ...] = ("conversation_id",) if layout == "text" else _BY_NAME
    if layout in ("messages", "sharegpt"):  # a conversation has its turns and its thoughts
        by_name = tuple(name for name in by_name if name not in ("history", "reasoning"))
    fields = {*LAYOUT_FIELDS[layout], *_ALSO.get(layout, ()), *by_name, *mapped}
    used = {name: names[name] for name in FIELDS if name in fields}
    if layout != "pairs" and "rejected" in used and "rejected" not in source.columns:
        used["rejected"] = tuple(c for c in used["rejected"] if c != "rejected")
    return used


Has = Callable[[str], bool]
"""Whether a file has a column for a field."""


def _fits(layout: str, has: Has) -> bool:
    """Whether there is what an answered record needs."""
    answered = layout != "question_answer" or any(has(f) for f in RESPONSES)
    return answered and all(has(f) for f in _REQUIRED[layout])


def _asks(layout: str, has: Has) -> bool:
    """Whether there is what a record without a response needs."""
    return layout in _PROMPT and all(has(f) for f in _PROMPT[layout])


def _decide(
    source: Source,
    names: Mapping[str, tuple[str, ...]],
    columns: list[str],
    holds: Holds,
    seen: str,
) -> tuple[str, bool]:
    """The layout, and whether its records have responses."""
    there = set(columns)

    def by_own_name(name: str) -> bool:
        own = source.columns.get(name, name)
        return own in there and own in names[name]

    def by_any_name(name: str) -> bool:
        return any(column in there for column in names[name])

    tests = [(_fits, by_own_name), (_fits, by_any_name)] if holds != "prompts" else []
    tests += [(_asks, by_own_name), (_asks, by_any_name)]
    if source.layout != "auto":
        found = next((test for test, has in tests if test(source.layout, has)), None)
        if found is None or (found is _asks and holds == "responses"):
            raise ValueError(_lacking(source.layout, seen))
        return source.layout, found is _fits
    mapped = source.mapped_layout_fields()
    among = [n for n, fields in LAYOUT_FIELDS.items() if mapped <= {*fields, *_ALSO.get(n, ())}]
    for test, has in tests:
        layout = _only([name for name in among if test(name, has)], seen, answered=test is _fits)
        if layout is not None:
            return layout, test is _fits
    if "segments" in there:
        raise ValueError(
            "segments hold templated text with a mask of the loss, which no row can: write them "
            f"as messages; {seen}"
        )
    raise ValueError(f"no layout fits; state layout, or map its fields in columns; {seen}")


def _only(layouts: list[str], seen: str, *, answered: bool) -> str | None:
    """The one layout among some, None of none.

    Raises:
        ValueError: if there are several and none goes before the others.
    """
    if answered and "pairs" in layouts:
        return "pairs"
    if len(layouts) > 1 and "text" in layouts:
        layouts.remove("text")
    if len(layouts) > 1:
        raise ValueError(
            f"layouts {', '.join(layouts)} all fit; state layout, or map its fields in "
            f"columns; {seen}"
        )
    return layouts[0] if layouts else None


def _lacking(layout: str, seen: str) -> str:
    needs = ", ".join(_REQUIRED[layout])
    if layout == "question_answer":
        needs += " and response, answer or solution"
    return f"layout {layout} needs {needs}; map them in columns; {seen}"


def _with_one_response(
    source: Source,
    used: dict[str, tuple[str, ...]],
    columns: list[str],
    seen: str,
    answered: bool,
) -> dict[str, tuple[str, ...]]:
    """Settles which column answers a question, and whether `answer` is the reference."""
    kept = {f: c for f, c in used.items() if f not in RESPONSES}
    mapped = [f for f in RESPONSES if f in source.columns]
    if not answered:
        kept |= {f: used[f] for f in ("response", "answer") if f in mapped}
        return kept
    has = {f: source.columns.get(f, f) for f in RESPONSES}
    present = [f for f in RESPONSES if has[f] in columns and has[f] not in source.set_aside]
    if len(mapped) == 2 and "answer" in mapped:
        response = mapped[0] if mapped[0] != "answer" else mapped[1]
    elif len(mapped) == 1 and mapped != ["answer"]:
        response = mapped[0]
    elif len(mapped or present) == 1 and len(present) == 1:
        response = present[0]
    else:
        raise ValueError(
            f"{', '.join(present)} could each be the response; "
            f"map response, and answer if it is a reference; {seen}"
        )
    if "answer" in mapped and response != "answer":
        kept["answer"] = (has["answer"],)
    return {**kept, "response": (has[response],)}


def _check_answer(
    source: Source, layout: str, used: Mapping[str, tuple[str, ...]], answered: bool
) -> None:
    if "answer" not in used or not answered:
        return
    (column,) = used["answer"]
    if source.answer_pattern is not None:
        raise ValueError(
            f"answers come from the column {column!r} or from answer_pattern, not both"
        )
    read = {c for f in LAYOUT_FIELDS[layout] if f in used for c in used[f][:1]}
    if column in read:
        raise ValueError(
            f"column {column!r} is mapped to answer but already read as part of the "
            "conversation, so it is no independent reference; use answer_pattern"
        )
