"""Records of every known layout into conversations: which layout it is, and how it is read.

A layout is decided once per file, from the columns its first records have, and a guess is never
made: no layout or several is an error that names the columns. `text` counts only when nothing else
fits, because Alpaca files carry their rendered template in a column of that name.

A reference answer is taken only from a column mapped to `answer`, so that "independent of the
response" is always somebody's statement.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from siftline.ingest.source import COMMON_FIELDS, FIELDS, LAYOUT_FIELDS, Source
from siftline.ingest.turns import (
    Turn,
    Unreadable,
    as_json,
    as_text,
    assistant,
    check_conversation,
    plain,
    read_turns,
    to_json,
    user,
)
from siftline.schema import canonical_text, make_row, message

_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question",),
    "pairs": ("chosen", "rejected"),
    "text": ("text",),
}
_RESPONSES = ("response", "answer", "solution")
_TAKEN_BY_NAME = {
    "messages": ("conversation_id", "system", "tools"),
    "sharegpt": ("conversation_id", "system", "tools"),
    "alpaca": ("conversation_id", "system"),
    "prompt_completion": ("conversation_id", "tools"),
    "question_answer": ("conversation_id",),
    "pairs": ("conversation_id", "tools"),
    "text": ("conversation_id",),
}
"""Common fields whose columns need no mapping, because they mean the same in every such file."""


@dataclass(frozen=True)
class Plan:
    """How the records of one file are read.

    Attributes:
        source: The recipe's words on it.
        stem: Source name of rows that have no other.
        layout: The layout; never `auto`.
        column: Field -> input column, for the fields this file has.
        required: Columns a record must have.
    """

    source: Source
    stem: str
    layout: str
    column: dict[str, str]
    required: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A conversation read from a record, before it is judged.

    Attributes:
        turns: Canonical messages.
        unused: What of the used columns found no place, by column.
        pair: `chosen` or `rejected`, for rows of a pair.
    """

    turns: list[Turn]
    unused: dict[str, Any] = field(default_factory=dict)
    pair: str | None = None


@dataclass(frozen=True)
class Converted:
    """One row of `schema.ROW` and the JSON of the input columns it did not use."""

    row: dict[str, Any]
    leftover: str | None


def plan_for(source: Source, columns: list[str], stem: str) -> Plan:
    """Decides how a file with these columns is read.

    Raises:
        ValueError: if a mapped or needed column is missing, or no or several layouts fit. It names
            the columns seen; the caller adds the file.
    """
    seen = f"columns seen: {', '.join(columns) or 'none'}"
    for name, column in source.columns.items():
        if column not in columns:
            raise ValueError(f"no column {column!r}, which is mapped to {name!r}; {seen}")
    has = {f: source.columns.get(f, f) for f in FIELDS}
    has = {f: column for f, column in has.items() if column in columns}
    layout = _decide(source, has, seen)
    mapped = {f for f in COMMON_FIELDS if f in source.columns}
    if source.source is not None:
        mapped.discard("source")
    fields = {*LAYOUT_FIELDS[layout], *_TAKEN_BY_NAME[layout], *mapped}
    used = {f: has[f] for f in FIELDS if f in fields and f in has}
    if layout == "text" and (source.instruction is not None or mapped & {"system", "tools"}):
        raise ValueError("layout text has no prompt, so no instruction, system or tools")
    if layout == "question_answer":
        used = _with_one_response(source, used, has, seen)
    _check_answer(source, layout, used)
    required = [*_REQUIRED[layout], *(["response"] if layout == "question_answer" else [])]
    return Plan(source, stem, layout, used, tuple(used[f] for f in required))


def convert(record: Mapping[str, Any], plan: Plan) -> list[Converted | str]:
    """Turns one record into its rows, each a row or the reason it is none.

    One outcome, or two for a pair, whose halves stand or fall apart.
    """
    try:
        if any(column not in record for column in plan.required):
            raise Unreadable("missing_column")
        drafts = _READERS[plan.layout](_Fields(record, plan))
    except Unreadable as error:
        return [error.reason]
    except RecursionError:
        return ["invalid_json"]
    return [d if isinstance(d, str) else _judged(d, record, plan) for d in drafts]


def _decide(source: Source, has: Mapping[str, str], seen: str) -> str:
    def fits(layout: str) -> bool:
        answered = layout != "question_answer" or any(f in has for f in _RESPONSES)
        return answered and all(f in has for f in _REQUIRED[layout])

    if source.layout != "auto":
        if not fits(source.layout):
            needs = ", ".join(_REQUIRED[source.layout])
            if source.layout == "question_answer":
                needs += " and response, answer or solution"
            raise ValueError(f"layout {source.layout} needs {needs}; map them in columns; {seen}")
        return source.layout
    mapped = source.mapped_layout_fields()
    found = [name for name, f in LAYOUT_FIELDS.items() if mapped <= set(f) and fits(name)]
    if len(found) > 1 and "text" in found:
        found.remove("text")
    if len(found) != 1:
        fault = f"layouts {', '.join(found)} all fit" if found else "no layout fits"
        raise ValueError(f"{fault}; state layout, or map its fields in columns; {seen}")
    return found[0]


def _with_one_response(
    source: Source, used: dict[str, str], has: Mapping[str, str], seen: str
) -> dict[str, str]:
    """Settles which column answers a question, and whether `answer` is the reference."""
    mapped = [f for f in _RESPONSES if f in source.columns]
    present = [f for f in _RESPONSES if f in has]
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
    kept = {f: c for f, c in used.items() if f not in _RESPONSES}
    if "answer" in mapped and response != "answer":
        kept["answer"] = has["answer"]
    return {**kept, "response": has[response]}


def _check_answer(source: Source, layout: str, used: Mapping[str, str]) -> None:
    if "answer" not in used:
        return
    if source.answer_pattern is not None:
        raise ValueError(
            f"answers come from the column {used['answer']!r} or from answer_pattern, not both"
        )
    responses = {used[f] for f in LAYOUT_FIELDS[layout] if f in used}
    if used["answer"] in responses:
        raise ValueError(
            f"column {used['answer']!r} is mapped to answer but already read as part of the "
            "conversation, so it is no independent reference; use answer_pattern"
        )


@dataclass(frozen=True)
class _Fields:
    """A record seen through its plan: fields instead of columns."""

    record: Mapping[str, Any]
    plan: Plan

    def value(self, name: str) -> Any:
        column = self.plan.column.get(name)
        return self.record.get(column) if column is not None else None

    def text(self, name: str) -> str:
        return as_text(self.value(name))

    def turns(self, name: str) -> tuple[list[Turn], dict[str, Any]]:
        turns, unused = read_turns(self.value(name))
        column = self.plan.column[name]
        return turns, {f"{column}.{number}": keys for number, keys in unused.items()}


def _read_conversation(fields: _Fields) -> list[Draft | str]:
    turns, unused = fields.turns(
        "messages" if fields.plan.layout == "messages" else "conversations"
    )
    return [Draft(turns, unused)]


def _read_alpaca(fields: _Fields) -> list[Draft | str]:
    # The instruction, then its input on a line of its own, as LLaMA-Factory joins them.
    parts = [canonical_text(fields.text(name)) for name in ("instruction", "input")]
    prompt = "\n".join(part for part in parts if part)
    return [Draft([user(prompt), assistant(fields.text("output"))])]


def _read_prompt_completion(fields: _Fields) -> list[Draft | str]:
    prompt, unused = _text_or_turns(fields, "prompt", user)
    completion, rest = _text_or_turns(fields, "completion", assistant)
    return [Draft(prompt + completion, unused | rest)]


def _read_question_answer(fields: _Fields) -> list[Draft | str]:
    return [Draft([user(fields.text("question")), assistant(fields.text("response"))])]


def _read_text(fields: _Fields) -> list[Draft | str]:
    return [Draft([assistant(fields.text("text"))])]


def _read_pair(fields: _Fields) -> list[Draft | str]:
    """Both halves: strings or messages after the prompt, or whole conversations."""
    drafts: list[Draft | str] = []
    for half in ("chosen", "rejected"):
        try:
            turns, unused = _text_or_turns(fields, half, assistant)
            if not any(t["role"] == "user" for t in turns):
                if fields.value("prompt") is None:
                    raise Unreadable("missing_column")
                prompt, rest = _text_or_turns(fields, "prompt", user)
                turns, unused = prompt + turns, unused | rest
            drafts.append(Draft(turns, unused, half))
        except Unreadable as error:
            drafts.append(error.reason)
    return drafts


def _text_or_turns(
    fields: _Fields, name: str, one: Callable[[str], Turn]
) -> tuple[list[Turn], dict[str, Any]]:
    if isinstance(fields.value(name), list | tuple):
        return fields.turns(name)
    return [one(fields.text(name))], {}


def _judged(draft: Draft, record: Mapping[str, Any], plan: Plan) -> Converted | str:
    """Checks a draft and makes it a row, or says why it is none."""
    fields = _Fields(record, plan)
    try:
        turns = _with_system(draft.turns, fields)
        if plan.layout != "text":
            check_conversation(turns)
        elif not turns[-1]["content"]:
            raise Unreadable("empty_response")
        answer, answer_from = _answer(turns, fields)
        row = make_row(
            _instructed(turns, plan.source.instruction),
            answer=answer,
            answer_from=answer_from,
            source=_source_name(fields),
            conversation_id=canonical_text(fields.text("conversation_id")) or None,
            tools=as_json(fields.value("tools")),
        )
        converted = Converted(row, _leftover(draft, record, plan))
        # Lone surrogates, from JSON escapes or bytes that are no UTF-8, fit in no file.
        for text in (row["conversation_id"], row["tools"], row["source"], converted.leftover):
            (text or "").encode()
    except Unreadable as error:
        return error.reason
    except UnicodeEncodeError:
        return "invalid_utf8"
    except RecursionError:
        return "invalid_json"
    return converted


def _with_system(turns: list[Turn], fields: _Fields) -> list[Turn]:
    system = canonical_text(fields.text("system"))
    if not system:
        return turns
    if not turns or turns[0]["role"] != "system":
        return [message("system", system), *turns]
    if turns[0]["content"] != system:
        raise Unreadable("two_system_messages")
    return turns


def _instructed(turns: list[Turn], instruction: str | None) -> list[Turn]:
    """Puts the source's instruction before the first user message."""
    if instruction is None:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        raise Unreadable("no_user_message")
    turn = turns[first]
    asked = {**turn, "content": canonical_text(f"{instruction}\n{turn['content']}")}
    return [*turns[:first], asked, *turns[first + 1 :]]


def _answer(turns: list[Turn], fields: _Fields) -> tuple[str | None, str | None]:
    if "answer" in fields.plan.column:
        answer = canonical_text(fields.text("answer"))
        return (answer, "independent") if answer else (None, None)
    if fields.plan.source.answer_pattern is None:
        return None, None
    found = [*re.finditer(fields.plan.source.answer_pattern, turns[-1]["content"] or "")]
    answer = canonical_text(found[-1].group(1) or "") if found else ""
    return (answer, "response") if answer else (None, None)


def _source_name(fields: _Fields) -> str:
    given = fields.plan.source.source
    named = given if given is not None else fields.text("source")
    return canonical_text(named) or canonical_text(fields.plan.stem)


def _leftover(draft: Draft, record: Mapping[str, Any], plan: Plan) -> str | None:
    used = set(plan.column.values())
    rest = {name: value for name, value in record.items() if name not in used and value != ""}
    if draft.pair is not None:
        # Ours is what tells the halves apart; an input column of that name steps aside.
        if "pair" in rest:
            rest["input.pair"] = rest.pop("pair")
        rest["pair"] = draft.pair
    rest = plain({**rest, **draft.unused})
    return to_json(rest) if rest else None


_READERS: dict[str, Callable[[_Fields], list[Draft | str]]] = {
    "messages": _read_conversation,
    "sharegpt": _read_conversation,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "question_answer": _read_question_answer,
    "pairs": _read_pair,
    "text": _read_text,
}
