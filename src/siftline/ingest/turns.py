"""Messages of the chat formats in use into our messages, and odd values into text or JSON.

Two rules make one conversation get one id from JSONL, JSON and Parquet alike: a key whose value is
null is an absent key (Parquet fills structs with nulls), and every structured value becomes JSON
with sorted keys and no spaces.

Columns and keys that change what a row means although no row can hold them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from siftline.rows.schema import message

_MEDIA = re.compile(
    r"(?:rejected_)?(?:image|img|picture|photo|video|audio|pixel_value)s?"
    r"(?:_(?:path|file|url|id|byte|name|base64|b64|data|token|size)s?)?"
)
_MEDIA_PART = re.compile(r"(?:input_)?(?:image|video|audio|file)(?:_url|_path)?|media")
_TOKEN = re.compile(
    r"<\|(?:image|video|audio)(?:_pad|_[0-9]+)?\|>|<\|vision_start\|>|<start_of_image>"
    r"|<image_soft_token>|<image_placeholder>|<(image|video|audio)(?:_[0-9]+)?>"
)
_QUOTES = "`'\"\u2018\u201c"

Check = Callable[[Any], str | None]
"""The reason a value sets its record apart, or None."""


def filled(value: Any) -> bool:
    """Whether a value says anything: not null, NaN, or empty."""
    return value is not None and value == value and value not in ("", [], {}, ())


def truth(value: Any) -> bool | None:
    """A truth value however files write it; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return None


def _weight(value: Any) -> str | None:
    if not filled(value) or truth(value) is True:
        return None
    try:
        return None if float(value) == 1 else "weight"
    except (TypeError, ValueError):
        return "weight"


def _train(value: Any) -> str | None:
    return "no_loss" if truth(value) is False else None


def _refuted(value: Any) -> str | None:
    return "label" if value is False else None


def _if_filled(reason: str) -> Check:
    return lambda value: reason if filled(value) else None


def _if_structured(reason: str) -> Check:
    return lambda value: reason if filled(value) and isinstance(value, list | Mapping) else None


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("weight", "loss_weight", "sample_weight"), _weight),
    **dict.fromkeys(("train", "training"), _train),
    **dict.fromkeys(
        (
            "loss_mask",
            "loss_masks",
            "loss_scale",
            "assistant_mask",
            "assistant_masks",
            "completion_mask",
            "prompt_mask",
            "train_mask",
            "mask",
            "masks",
            "masked",
            "train_detail",
            "training_detail",
        ),
        _if_filled("loss_mask"),
    ),
    "labels": _if_structured("loss_mask"),
    **dict.fromkeys(
        ("correct", "is_correct", "accepted", "is_accepted", "preferred", "is_preferred", "chosen"),
        _refuted,
    ),
    "history": _if_structured("history"),
    "function_call": _if_structured("function_call"),
    "tool_calls": _if_filled("tool_calls"),
    "rejected_response": _if_filled("rejected_response"),
    "segments": _if_structured("loss_mask"),
}


PARTS_OF_A_QUESTION = ("context", "passage", "choices", "options")
"""Columns beside a question without which it is another one."""


@cache
def check_of(name: str) -> Check | None:
    """What a column or key of this name can set its record apart by, where no field takes it."""
    lower = name.lower()
    return _if_filled("media") if _MEDIA.fullmatch(lower) else _CHECKS.get(lower)


def is_media_part(kind: object) -> bool:
    """Whether a part of a message of this type is a picture, sound or file."""
    return isinstance(kind, str) and bool(_MEDIA_PART.fullmatch(kind))


def has_placeholder(text: str) -> bool:
    """Whether a text has a mark that a trainer puts a picture or a sound in the place of.

    HTML has tags of these names: one that is closed, quoted, or (video and audio) stands in the
    middle of a line is taken for that.
    """
    if "<" not in text:
        return False
    for mark in _TOKEN.finditer(text):
        name = mark.group(1)
        if name is None:
            return True
        if f"</{name}" in text or _is_quoted(text, mark.start(), mark.end()):
            continue
        if name == "image" or _at_an_edge(text, mark.start(), mark.end()):
            return True
    return False


def _is_quoted(text: str, start: int, end: int) -> bool:
    return text.count("`", 0, start) % 2 == 1 or (
        text[start - 1 : start] in _QUOTES and start > 0 and end < len(text)
    )


def _at_an_edge(text: str, start: int, end: int) -> bool:
    before, after = text[:start].rstrip(" \t"), text[end:].lstrip(" \t")
    return not before or not after or before[-1] in "\n>" or after[0] in "\n<"


Turn = dict[str, Any]

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    # ShareGPT files with tools: an assistant turn whose value is the call itself.
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALL_ROLES = ("function_call", "tool_call")
_CORE = frozenset({"role", "from", "content", "value"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LOSS = ("weight", "train", "training", "loss", "loss_weight")
"""OpenAI, axolotl (two names), ms-swift, LLaMA-Factory: whether a turn carries loss."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_THOUGHT_PARTS = ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "tool_calls", "function_call")


class Unreadable(Exception):
    """A record that becomes no row; `reason` is what quarantine says."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def as_text(value: object) -> str:
    """A text column's value; numbers as JSON writes them, null and NaN as the empty string.

    Raises:
        Unreadable: `wrong_type` for anything else; truth values have no agreed spelling.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise Unreadable("wrong_type")


def plain(value: Any, keep: str | None = None) -> Any:
    """The value in JSON types: null entries and NaN dropped from objects, other types as text.

    Args:
        value: Anything a file gives.
        keep: Key below which null entries stay.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        pairs = ((str(k), _whole(v) if k == keep else plain(v, keep)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v, keep) for v in value]
    return str(value)


def _whole(value: Any) -> Any:
    """As `plain`, with the null entries of objects."""
    if isinstance(value, Mapping):
        return {str(k): _whole(v) for k, v in value.items()}
    return [_whole(v) for v in value] if isinstance(value, list | tuple) else plain(value)


def to_json(value: Any) -> str:
    """Canonical JSON of `plain(value)`: sorted keys, no spaces."""
    return _dumped(plain(value))


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def structured(value: object) -> Any:
    """A list or object, given as such or as a JSON string; None when empty.

    Raises:
        Unreadable: `wrong_type` if it is neither.
    """
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list | tuple | Mapping):
        raise Unreadable("wrong_type")
    return value or None


def _calls_json(value: object, *, nulls: bool) -> str | None:
    """Calls as JSON; None when there are none.

    Args:
        value: A list of calls, one call, or the JSON text of either.
        nulls: Whether a null among the arguments was written; in JSON text it always was.

    Raises:
        Unreadable: `wrong_type` if it is none of them.
    """
    written = nulls or isinstance(value, str)
    value = plain(structured(value), "arguments" if written else None)
    return _dumped(value) if value else None


def read_turns(value: object, *, nulls: bool = False) -> tuple[list[Turn], dict[str, Any]]:
    """Reads a conversation: a list of messages, one message, or the JSON of either.

    Args:
        value: OpenAI messages (`role`, `content`) or ShareGPT turns (`from`, `value`).
        nulls: Whether a null argument of a call was written, and is not a column's filling.

    Returns:
        The messages, and by message number (from 0) the keys no mapping used.

    Raises:
        Unreadable: `wrong_type`, `unknown_role`, or what changes a row's meaning.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise Unreadable("wrong_type")
    turns, unused = [], {}
    for number, turn in enumerate(value):
        if type(turn) is not dict and not isinstance(turn, Mapping):
            raise Unreadable("wrong_type")
        read, rest = _read_turn(turn, nulls=nulls)
        turns.append(read)
        if rest:
            unused[str(number)] = rest
    return turns, unused


def user(content: str) -> Turn:
    """One user message."""
    return _checked(message("user", content))


def assistant(content: str) -> Turn:
    """One assistant message."""
    return _checked(message("assistant", content))


def check_conversation(turns: Sequence[Turn]) -> None:
    """Holds to what every prompted row needs: something asked, and an assistant's answer to it.

    Raises:
        Unreadable: `no_response`, `empty_response`, `no_loss` or `empty_prompt`.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise Unreadable("no_response")
    if not _says(turns[-1]):
        raise Unreadable("empty_response")
    if turns[-1]["weight"] == 0:
        raise Unreadable("no_loss")
    check_prompt(turns[:-1])


def check_prompt(turns: Sequence[Turn]) -> None:
    """A system message alone asks nothing.

    Raises:
        Unreadable: `empty_prompt`.
    """
    if not any(_says(t) for t in turns if t["role"] != "system"):
        raise Unreadable("empty_prompt")


def _says(turn: Turn) -> bool:
    return bool(turn["content"].strip() or turn["tool_calls"])


def _checked(turn: Turn) -> Turn:
    if has_placeholder(turn["content"]):
        raise Unreadable("media")
    return turn


def _read_turn(turn: Mapping[str, Any], *, nulls: bool) -> tuple[Turn, dict[str, Any]]:
    if len(turn) == 2:  # as most are
        text, role = turn.get("content"), _ROLES.get(turn.get("role"))  # type: ignore[arg-type]
        if role is not None and isinstance(text, str) and turn["role"] not in _CALL_ROLES:
            return _checked(message(role, text)), {}
    named = _first(turn, "role", "from")
    if not isinstance(named, str):
        raise Unreadable("unknown_role" if named is None else "wrong_type")
    named = named.strip().lower()
    role = _ROLES.get(named)
    if role is None:
        raise Unreadable("unknown_role")
    content = _first(turn, "content", "value")
    rest = {k: v for k, v in turn.items() if k not in _CORE and v is not None}
    if isinstance(content, str) and not rest and named not in _CALL_ROLES:
        return _checked(message(role, content)), {}
    if named in _CALL_ROLES:
        _call(content)
        rest["tool_calls"], content = content, None
    text, parts = _content(content)
    rest = {**parts, **rest}
    fields = _take_fields(role, rest, nulls=nulls)
    return _checked(message(role, text, **fields)), plain(rest)


def _take_fields(role: str, rest: dict[str, Any], *, nulls: bool) -> dict[str, Any]:
    """Takes the keys that a message has a field for out of `rest`.

    Raises:
        Unreadable: for a key that changes what the turn means and has no field.
    """
    found: dict[str, Any] = {}
    for key in _REASONING:
        if isinstance(rest.get(key), str):
            thought = rest.pop(key)
            if "reasoning" not in found and thought.strip():
                found["reasoning"] = thought
            elif thought.strip() and thought != found["reasoning"]:
                rest[key] = thought
    calls, legacy = rest.pop("tool_calls", None), rest.pop("function_call", None)
    found["tool_calls"] = _calls_json(calls, nulls=nulls)
    if filled(legacy) and found["tool_calls"] is None:
        written = nulls or isinstance(legacy, str)
        found["tool_calls"] = _calls_json(_wrapped(legacy), nulls=written)
    for key in ("tool_call_id", "name"):
        found[key] = as_text(rest.pop(key, None)) or None
    found["weight"] = _loss(role, rest)
    for key, value in rest.items():
        check = check_of(key)
        reason = check(value) if check else None
        if reason is not None:
            raise Unreadable(reason)
    return found


def _loss(role: str, rest: dict[str, Any]) -> int | None:
    """0 where the turn carries no loss; takes the keys that say so.

    Raises:
        Unreadable: `weight` for anything between, `prompt_loss` where another's turn is learned.
    """
    weights = []
    for key in _LOSS:
        given = rest.pop(key, None)
        if not filled(given):
            continue
        carries = truth(given)
        if carries is None:
            raise Unreadable("weight")
        weights.append(carries)
    if role != "assistant":
        if any(weights):
            raise Unreadable("prompt_loss")
        return None
    return None if all(weights) else 0


def _wrapped(call: object) -> Any:
    """A call of the older form, `{name, arguments}`, in the form that replaced it."""
    call = structured(call)
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise Unreadable("function_call")
    return [{"type": "function", "function": dict(call)}]


def _call(value: object) -> Any:
    """The call that a ShareGPT turn is.

    Raises:
        Unreadable: `function_call` if it is no JSON of one.
    """
    try:
        call = structured(value)
    except Unreadable:
        raise Unreadable("function_call") from None
    if call is None:
        raise Unreadable("function_call")
    return call


def _content(value: object) -> tuple[str, dict[str, Any]]:
    """A message's text, and reasoning and calls that stand among its parts.

    A string, or text parts joined by newlines as vLLM joins them.
    """
    if not isinstance(value, list | tuple):
        return as_text(value), {}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if is_media_part(kind):
            raise Unreadable("media")
        said = _said(part, kind)
        if kind in _CALL_PARTS:
            calls.append(said)
        elif not isinstance(said, str) or kind not in (*_TEXT_PARTS, *_THOUGHT_PARTS):
            # Parts of other kinds have no place in a row; dropping them would lie.
            raise Unreadable("wrong_type")
        else:
            (thoughts if kind in _THOUGHT_PARTS else texts).append(said)
    found: dict[str, Any] = {}
    if thoughts:
        found["reasoning_content"] = "\n".join(thoughts)
    if calls:
        found["tool_calls"] = [call for said in calls for call in _listed(said)]
    return "\n".join(texts), found


def _said(part: object, kind: object) -> Any:
    """What a part holds: under `text`, LLaMA-Factory's `value`, or its own type's name."""
    if not isinstance(part, Mapping):
        return part
    return _first(part, "text", "value", *([kind] if isinstance(kind, str) else []))


def _listed(said: object) -> list[Any]:
    call = _call(said)
    return list(call) if isinstance(call, list | tuple) else [call]


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        value = turn.get(key)
        if value is not None:
            return value
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unreadable("wrong_type") from error
