"""Records of every known layout into conversations, by the plan of their file (see `plans`).

Text is kept to the character. A record that says something no row can hold is no row: `Unreadable`
carries the reason.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from siftline.ingest.plans import Plan, plan_for
from siftline.ingest.turns import (
    PARTS_OF_A_QUESTION,
    Turn,
    Unreadable,
    as_text,
    assistant,
    check_conversation,
    check_of,
    check_prompt,
    filled,
    plain,
    read_turns,
    structured,
    to_json,
    truth,
    user,
)
from siftline.rows.schema import canonical_text, make_row, message

__all__ = ["Converted", "Plan", "convert", "plan_for"]


@dataclass(frozen=True)
class Draft:
    """A conversation read from a record, before it is judged.

    Attributes:
        turns: Its messages; the last is the assistant's, but for a prompt.
        unused: What of the used columns found no place, by column.
        pair: `chosen` or `rejected`, for rows of a pair.
        rejected: Whether its response is labelled a bad one.
    """

    turns: list[Turn]
    unused: dict[str, Any] = field(default_factory=dict)
    pair: str | None = None
    rejected: bool = False


@dataclass(frozen=True)
class Converted:
    """One row.

    Attributes:
        row: Columns of `schema.ROW`.
        leftover: JSON of the input columns it did not use.
        rejected: Whether its response is labelled a bad one: no row to train on.
        aside: Names of the columns and keys that say something and were not read.
    """

    row: dict[str, Any]
    leftover: str | None
    rejected: bool = False
    aside: tuple[str, ...] = ()


def convert(record: Mapping[str, Any], plan: Plan) -> list[Converted | str]:
    """Turns one record into its rows, each a row or the reason it is none.

    One outcome, or two for a pair, whose halves stand or fall apart.
    """
    fields = _Fields(record, plan)
    try:
        for name in plan.required:
            if not any(column in record for column in plan.names[name]):
                raise Unreadable("missing_column")
        drafts = _READERS[plan.layout](fields)
        _check_rest(fields)
    except Unreadable as error:
        return [error.reason]
    except RecursionError:
        return ["invalid_json"]
    return [d if isinstance(d, str) else _judged(d, fields) for d in drafts]


class _Fields:
    """A record seen through its plan: fields instead of columns.

    Attributes:
        taken: Columns that were read.
    """

    def __init__(self, record: Mapping[str, Any], plan: Plan) -> None:
        self.record, self.plan = record, plan
        self.taken: set[str] = set()

    def value(self, name: str) -> Any:
        """What the first of a field's columns that says something holds; None where none does."""
        record = self.record
        for column in self.plan.names.get(name, ()):
            value = record.get(column)
            if value is not None and value != "":
                self.taken.add(column)
                return value
        return None

    def text(self, name: str) -> str:
        return as_text(self.value(name))

    def column(self, name: str) -> str:
        """The column that a field was read from."""
        return next((c for c in self.plan.names[name] if c in self.taken), name)

    def turns(self, name: str) -> tuple[list[Turn], dict[str, Any]]:
        turns, unused = read_turns(self.value(name), nulls=self.plan.nulls)
        column = self.column(name)
        return turns, {f"{column}.{number}": keys for number, keys in unused.items()}

    def instructions(self) -> dict[str, Any] | None:
        """IFEval's constraints, whose two columns belong together."""
        found = {name: self.record.get(name) for name in ("instruction_id_list", "kwargs")}
        if not filled(found["instruction_id_list"]):
            return None
        self.taken.update(found)
        return found

    def drop(self, name: str) -> None:
        """Leaves a field's columns over after all."""
        self.taken.difference_update(self.plan.names.get(name, ()))


def _check_rest(fields: _Fields) -> None:
    """Holds to what the columns that no field took say.

    Raises:
        Unreadable: for one that changes what the row means.
    """
    for name, value in fields.record.items():
        if name in fields.taken or name in fields.plan.ignored:
            continue
        check = check_of(name)
        reason = check(value) if check else None
        if fields.plan.layout == "question_answer" and name.lower() in PARTS_OF_A_QUESTION:
            reason = "part_of_question" if filled(value) else None
        if reason is not None and (fields.plan.layout != "text" or reason in _OF_TEXT):
            raise Unreadable(reason)


_OF_TEXT = ("media", "weight", "no_loss", "loss_mask")
"""What a plain text can mean beside its words."""


def _read_conversation(fields: _Fields) -> list[Draft | str]:
    name = "messages" if fields.plan.layout == "messages" else "conversations"
    turns, unused = fields.turns(name)
    return _with_rejected(fields, turns, unused)


def _with_rejected(fields: _Fields, turns: list[Turn], unused: dict[str, Any]) -> list[Draft | str]:
    """The conversation, and beside it the response that ms-swift calls the rejected one."""
    if fields.value("rejected") is None:
        return [Draft(turns, unused)]
    try:
        other, rest = _text_or_turns(fields, "rejected", assistant)
        if not any(turn["role"] == "user" for turn in other):
            other = turns[:-1] + other
        second: Draft | str = Draft(other, rest, "rejected", rejected=True)
    except Unreadable as error:
        second = error.reason
    return [Draft(turns, unused, "chosen"), second]


def _read_alpaca(fields: _Fields) -> list[Draft | str]:
    prompt = [*_history(fields), user(_instruction(fields))]
    both = fields.value("output")
    if isinstance(both, list | tuple):  # LLaMA-Factory's older pairs: the better one first
        if len(both) != 2:
            raise Unreadable("wrong_type")
        return [
            Draft([*prompt, assistant(as_text(text))], {}, half, half == "rejected")
            for half, text in zip(("chosen", "rejected"), both, strict=True)
        ]
    return [Draft([*prompt, *_response(fields, "output")])]


def _instruction(fields: _Fields) -> str:
    """The instruction, then its input on a line of its own, as LLaMA-Factory joins them."""
    parts = [fields.text(name) for name in ("instruction", "input")]
    return "\n".join(part for part in parts if part.strip())


def _read_prompt_completion(fields: _Fields) -> list[Draft | str]:
    prompt, unused = _text_or_turns(fields, "prompt", user)
    if isinstance(fields.value("completion"), list | tuple):
        completion, rest = fields.turns("completion")
    else:
        completion, rest = _response(fields, "completion"), {}
    return [Draft([*_history(fields), *prompt, *completion], unused | rest)]


def _read_question_answer(fields: _Fields) -> list[Draft | str]:
    prompt = [*_history(fields), user(fields.text("question"))]
    return _with_rejected(fields, [*prompt, *_response(fields, "response")], {})


def _read_text(fields: _Fields) -> list[Draft | str]:
    return [Draft([assistant(fields.text("text"))])]


def _read_pair(fields: _Fields) -> list[Draft | str]:
    """Both halves: strings or messages after the prompt, or whole conversations."""
    drafts: list[Draft | str] = []
    for half in ("chosen", "rejected"):
        try:
            turns, unused = _text_or_turns(fields, half, assistant)
            if any(t["role"] == "user" for t in turns):
                _leave_another_prompt(fields, turns)
            else:
                prompt, rest = _prompt_of_pair(fields)
                turns, unused = prompt + turns, unused | rest
            drafts.append(Draft(turns, unused, half, half == "rejected"))
        except Unreadable as error:
            drafts.append(error.reason)
    return drafts


def _prompt_of_pair(fields: _Fields) -> tuple[list[Turn], dict[str, Any]]:
    """What stands before both responses, in whichever columns the trainers put it."""
    for name in ("prompt", "conversations", "messages"):
        if fields.value(name) is not None:
            prompt, unused = _text_or_turns(fields, name, user)
            return [*_history(fields), *prompt], unused
    if fields.value("instruction") is not None:
        return [*_history(fields), user(_instruction(fields))], {}
    if fields.value("question") is None:
        raise Unreadable("missing_column")
    return [*_history(fields), user(fields.text("question"))], {}


def _leave_another_prompt(fields: _Fields, turns: Sequence[Turn]) -> None:
    """A prompt beside whole conversations is read only where they repeat it."""
    prompt = fields.value("prompt")
    if prompt is None:
        return
    said = {turn["content"] for turn in turns}
    asked = [{"content": prompt}] if isinstance(prompt, str) else prompt
    shown = [turn.get("content") for turn in asked if isinstance(turn, Mapping)]
    if not shown or not said >= {text for text in shown if isinstance(text, str)}:
        fields.drop("prompt")


def _response(fields: _Fields, name: str) -> list[Turn]:
    """The response that stands in a column, with the reasoning that stands in another.

    Prompts have none: what stands there is left over.
    """
    if fields.plan.holds == "prompts":
        return []
    value = fields.value(name)
    if value is None and (fields.plan.holds == "either" or name not in fields.plan.required):
        return []
    thought = fields.value("reasoning")
    if not isinstance(thought, str):
        fields.drop("reasoning")
        thought = None
    return [{**assistant(as_text(value)), "reasoning": thought}]


def _history(fields: _Fields) -> list[Turn]:
    """Earlier turns: pairs of what was asked and answered, or messages.

    Raises:
        Unreadable: `history` if it is anything else.
    """
    given = fields.value("history")
    if given is None:
        return []
    try:
        given = structured(given)
    except Unreadable:
        raise Unreadable("history") from None
    turns: list[Turn] = []
    for pair in given or []:
        if isinstance(pair, Mapping):
            turns += read_turns(pair)[0]
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [user(as_text(pair[0])), assistant(as_text(pair[1]))]
        else:
            raise Unreadable("history")
    return turns


def _text_or_turns(
    fields: _Fields, name: str, one: Callable[[str], Turn]
) -> tuple[list[Turn], dict[str, Any]]:
    if isinstance(fields.value(name), list | tuple | Mapping):
        return fields.turns(name)
    return [one(fields.text(name))], {}


def _judged(draft: Draft, fields: _Fields) -> Converted | str:
    """Checks a draft and makes it a row, or says why it is none."""
    plan = fields.plan
    try:
        turns = _with_response(_with_system(draft.turns, fields), plan)
        answer, answer_from = _answer(turns, fields)
        rejected = draft.rejected or _labelled_bad(fields)
        row = make_row(
            _instructed(turns, plan.source.instruction),
            answer=answer,
            answer_from=answer_from,
            source=_source_name(fields),
            conversation_id=fields.text("conversation_id").strip() or None,
            tools=_tools(fields),
        )
        leftover, aside = _leftover(draft, fields, rejected=rejected)
        converted = Converted(row, leftover, rejected, aside)
        # Lone surrogates, from JSON escapes or bytes that are no UTF-8, fit in no file.
        for text in (row["conversation_id"], row["tools"], row["source"], leftover):
            (text or "").encode()
    except Unreadable as error:
        return error.reason
    except UnicodeEncodeError:
        return "invalid_utf8"
    except RecursionError:
        return "invalid_json"
    return converted


def _with_response(turns: list[Turn], plan: Plan) -> list[Turn]:
    """The conversation as a row has it; a prompt alone ends in an empty response.

    Raises:
        Unreadable: `has_response` among prompts, or as `check_conversation`.
    """
    if plan.layout == "text":
        if not turns[-1]["content"].strip():
            raise Unreadable("empty_response")
        return turns
    answered = bool(turns) and turns[-1]["role"] == "assistant"
    if plan.holds == "prompts" and answered:
        raise Unreadable("has_response")
    if plan.holds == "responses" or answered:
        check_conversation(turns)
        return turns
    check_prompt(turns)
    return [*turns, message("assistant", "")]


def _labelled_bad(fields: _Fields) -> bool:
    """Whether a label says that the response is a bad one (TRL's, ms-swift's, LLaMA-Factory's KTO).

    Words are a class of something, not a label of ours, and left over.

    Raises:
        Unreadable: `label` for a number that is no truth value.
    """
    value = fields.value("label")
    if not filled(value) or fields.plan.holds == "prompts":
        fields.drop("label")
        return False
    label = truth(value)
    if label is None:
        if isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdigit()):
            raise Unreadable("label")
        fields.drop("label")
    return label is False


def _tools(fields: _Fields) -> str | None:
    given = structured(fields.value("tools"))
    if isinstance(given, list | tuple) and fields.column("tools") == "functions":
        given = [{"type": "function", "function": tool} for tool in given]  # the older form
    given = plain(given)
    return to_json(given) if given else None


def _with_system(turns: list[Turn], fields: _Fields) -> list[Turn]:
    system = fields.text("system")
    if not system.strip():
        return turns
    if not turns or turns[0]["role"] != "system":
        return [message("system", system), *turns]
    if canonical_text(turns[0]["content"]) != canonical_text(system):
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
    asked = {**turn, "content": f"{instruction}\n{turn['content']}"}
    return [*turns[:first], asked, *turns[first + 1 :]]


def _answer(turns: list[Turn], fields: _Fields) -> tuple[str | None, str | None]:
    pattern = fields.plan.source.answer_pattern
    if "answer" in fields.plan.names:
        answer = _reference(fields)
        if pattern is not None:
            answer = _last_match(pattern, answer)
        answer = answer.strip()
        return (answer, "independent") if answer else (None, None)
    if pattern is None:
        return None, None
    answer = _last_match(pattern, turns[-1]["content"])
    return (answer, "response") if answer else (None, None)


def _last_match(pattern: str, text: str) -> str:
    found = [*re.finditer(pattern, text)]
    return canonical_text(found[-1].group(1) or "") if found else ""


def _reference(fields: _Fields) -> str:
    """The reference answer; constraints and lists of them as JSON."""
    value = fields.value("answer")
    if value is None and fields.plan.holds != "responses":
        value = fields.instructions()
    if isinstance(value, Mapping) and fields.column("answer") == "reward_model":  # as verl has it
        value = value.get("ground_truth")
    if isinstance(value, list | tuple | Mapping):
        return to_json(value)
    return as_text(value)


def _source_name(fields: _Fields) -> str:
    given = fields.plan.source.source
    named = given if given is not None else fields.text("source")
    return canonical_text(named) or canonical_text(fields.plan.stem)


def _leftover(
    draft: Draft, fields: _Fields, *, rejected: bool
) -> tuple[str | None, tuple[str, ...]]:
    """JSON of what was not read, and the names of those that say something."""
    taken = fields.taken
    rest = {name: v for name, v in fields.record.items() if name not in taken and v != ""}
    model = fields.record.get("reward_model") if "reward_model" in taken else None
    if isinstance(model, Mapping):  # of which the answer was read
        rest["reward_model"] = {key: v for key, v in model.items() if key != "ground_truth"}
    aside = [name for name, value in rest.items() if filled(value)]
    for place, keys in draft.unused.items():
        column = place.partition(".")[0]
        aside += [f"{column}[].{key}" for key in keys]
    if draft.pair is not None:
        # Ours is what tells the halves apart; an input column of that name steps aside.
        if "pair" in rest:
            rest["input.pair"] = rest.pop("pair")
        rest["pair"] = draft.pair
    elif rejected:
        rest["label"] = False
    rest = plain({**rest, **draft.unused})
    return (_compact(rest) if rest else None), tuple(dict.fromkeys(aside))


def _compact(rest: dict[str, Any]) -> str:
    """JSON with sorted keys; of what nothing is hashed from, so the fast library may write it."""
    try:
        return orjson.dumps(rest, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError:  # whole numbers of more than 64 bits; half surrogates are found later
        return to_json(rest)


_READERS: dict[str, Callable[[_Fields], list[Draft | str]]] = {
    "messages": _read_conversation,
    "sharegpt": _read_conversation,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "question_answer": _read_question_answer,
    "pairs": _read_pair,
    "text": _read_text,
}
