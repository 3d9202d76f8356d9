"""Defects planted into a user's own rows, to measure what a gate makes of them.

Every kind takes a row and returns one that differs in one respect, or None where the row has
nothing of that kind to spoil (a response without a number has no number to change). Which number,
which cut and which words is a hashed draw on the row's id: a row is always spoiled the same way.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from siftline.kernels.draws import hash64
from siftline.kernels.text.words import words
from siftline.rows import schema
from siftline.scoring.answers.quantities import answer_key

CLOSE = 0.85
"""Similarity that a near copy keeps in prompt and response: above the gates' usual 0.8."""
_SHINGLE = 5
_PROMPT_EDITS = ("{} Thanks.", "Please: {}", "So: {}", "{} Explain.", "{} .", "{}..", "{}!")
_RESPONSE_EDITS = ("{} That is all.", "So {}", "Sure: {}", "{} .", "{}..", "{}!")
_NUMBER = re.compile(r"\d{1,18}")
_SHIFTS = (1, 2, 3, 5, 7, 10, 20)
_LOOP_WORDS = 12
_LOOPED_WORDS = 200
_LOOP_CHARACTERS = 4000
"""Words of a loop: at most `_LOOP_WORDS` a turn, about `_LOOPED_WORDS` in all."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Canary:
    """A planted row.

    Attributes:
        kind: A key of `DEFECTS`.
        source_id: The row it was made from.
        row: Columns of `schema.ROW`.
    """

    kind: str
    source_id: str
    row: dict[str, Any]


def _choice(size: int, kind: str, row: Row, what: str = "") -> int:
    return hash64("canary", kind, row["id"], what) % size


def _remade(row: Row, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return schema.make_row(
        messages,
        **{
            name: row[name]
            for name in ("answer", "answer_from", "source", "conversation_id", "tools")
        },
    )


def _with_response(row: Row, text: str) -> dict[str, Any] | None:
    """The row with another response; None where that changes nothing or leaves nothing."""
    last = row["messages"][-1]
    changed = schema.message(last["role"], text)
    if not changed["content"] or changed["content"] == last["content"]:
        return None
    return _remade(row, [*row["messages"][:-1], changed])


def _with_prompt(row: Row, text: str) -> dict[str, Any] | None:
    """The row with another last user message; None where it has none."""
    before = list(row["messages"][:-1])
    if not before or before[-1]["role"] != "user" or not before[-1]["content"]:
        return None
    before[-1] = schema.message("user", text)
    return _remade(row, [*before, row["messages"][-1]])


def _response(row: Row) -> str:
    return row["messages"][-1]["content"] or ""


def _prompt(row: Row) -> str:
    return (row["messages"][-2]["content"] or "") if len(row["messages"]) > 1 else ""


def swapped_answer(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response of another prompt; None where the partner says the same, or answers the same.

    Multiple choice has few answers: another prompt's response is often right, and is no defect.
    """
    if partner["prompt_id"] == row["prompt_id"]:
        return None
    known = (row["answer"], partner["answer"])
    if None not in known and len({answer_key(answer) for answer in known}) == 1:
        return None
    if words(_response(partner)) == words(_response(row)):
        return None
    return _with_response(row, _response(partner))


def truncated(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response cut somewhere in its second half; None below eight characters."""
    text = _response(row)
    if len(text) < 8:
        return None
    half = len(text) // 2
    return _with_response(row, text[: half + _choice(len(text) - half, "truncated", row)])


def looped(row: Row, partner: Row) -> dict[str, Any] | None:
    """The response with its last words over and over, as a sampler that finds no end writes it.

    None where they are no words: two hundred copies of a megabyte are no loop that anybody meets.
    """
    words = _response(row).split()
    if not words:
        return None
    tail = words[-1 - _choice(_LOOP_WORDS, "looped", row) :]
    if sum(map(len, tail)) > _LOOP_CHARACTERS:
        return None
    times = -(-_LOOPED_WORDS // len(tail))
    return _with_response(row, " ".join([_response(row), *tail * times]))


def _shifted(text: str, kind: str, row: Row) -> str | None:
    """One number of the text made larger."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    chosen = numbers[_choice(len(numbers), kind, row)]
    larger = int(chosen[0]) + _SHIFTS[_choice(len(_SHIFTS), kind, row, "shift")]
    return text[: chosen.start()] + str(larger) + text[chosen.end() :]


def one_number(row: Row, partner: Row) -> dict[str, Any] | None:
    """One number of the response is larger than it was; None where there is none."""
    text = _shifted(_response(row), "one_number", row)
    return _with_response(row, text) if text else None


def other_question(row: Row, partner: Row) -> dict[str, Any] | None:
    """One number of the prompt is larger: another question, and no copy of the row."""
    text = _shifted(_prompt(row), "other_question", row)
    return _with_prompt(row, text) if text else None


def near_copy(row: Row, partner: Row) -> dict[str, Any] | None:
    """The row with words put before or after both texts, each still `CLOSE` to what it was."""
    response = _close_edit(_response(row), _RESPONSE_EDITS, row)
    changed = _with_response(row, response) if response else None
    if changed is None or len(row["messages"]) == 1:
        return changed
    prompt = _close_edit(_prompt(row), _PROMPT_EDITS, row)
    return _with_prompt(changed, prompt) if prompt else None


def leaked(row: Row, partner: Row) -> dict[str, Any] | None:
    """An evaluation row as a pool row, its prompt reworded at the ends."""
    edit = _PROMPT_EDITS[_choice(len(_PROMPT_EDITS), "leaked", row)]
    return _with_prompt(row, edit.format(_prompt(row)))


def gold_answer(row: Row, partner: Row) -> dict[str, Any] | None:
    """A sound row by construction: the independent answer itself, marked as final."""
    if row["answer"] is None or row["answer_from"] != "independent":
        return None
    return _with_response(row, f"The answer follows.\n#### {row['answer']}")


DEFECTS: dict[str, Callable[[Row, Row], dict[str, Any] | None]] = {
    "swapped_answer": swapped_answer,
    "truncated": truncated,
    "looped": looped,
    "one_number": one_number,
    "near_copy": near_copy,
    "leaked": leaked,
    "other_question": other_question,
    "gold_answer": gold_answer,
}
"""How each kind is made of a row and a partner, the row drawn after it."""

SOUND = frozenset({"other_question", "gold_answer", "proven"})
"""Kinds that a gate should keep: removing one is a false drop. Proven rows are real ones."""


def _close_edit(text: str, edits: tuple[str, ...], row: Row) -> str | None:
    start = _choice(len(edits), "near_copy", row)
    for edit in edits[start:] + edits[:start]:
        if similarity(text, edit.format(text)) >= CLOSE:
            return edit.format(text)
    return None


def similarity(left: str, right: str) -> float:
    """Jaccard similarity of the 5-character shingles of two texts, case and spacing folded."""
    a, b = (_shingles(words(text)) for text in (left, right))
    return len(a & b) / len(a | b)


def _shingles(text: str) -> set[str]:
    return {text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1))}
