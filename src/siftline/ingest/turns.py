"""Messages of the chat formats in use into canonical messages, and odd values into text or JSON.

Two rules make one conversation get one id from JSONL, JSON and Parquet alike: a key whose value is
null is an absent key (Parquet fills structs with nulls), and every structured value becomes JSON
with sorted keys and no spaces.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from siftline.schema import canonical_text, message

Turn = dict[str, str | None]

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
_TURN_KEYS = ("role", "from", "content", "value", "reasoning_content", "reasoning", "tool_calls")


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


def plain(value: Any) -> Any:
    """The value in JSON types: null entries and NaN dropped from objects, other types as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        pairs = ((str(k), plain(v)) for k, v in value.items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value)


def to_json(value: Any) -> str:
    """Canonical JSON of `plain(value)`: sorted keys, no spaces."""
    return json.dumps(plain(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def as_json(value: object) -> str | None:
    """A structured column (tools, tool calls), given as such or as a JSON string; None when empty.

    Raises:
        Unreadable: `wrong_type` if it is neither an object, nor a list, nor JSON of one.
    """
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list | tuple | Mapping):
        raise Unreadable("wrong_type")
    value = plain(value)
    return canonical_text(to_json(value)) if value else None


def read_turns(value: object) -> tuple[list[Turn], dict[str, Any]]:
    """Reads a conversation: a list of messages, or the JSON of one.

    Args:
        value: OpenAI messages (`role`, `content`) or ShareGPT turns (`from`, `value`).

    Returns:
        The canonical messages, and by message number (from 0) the keys no mapping used.

    Raises:
        Unreadable: `wrong_type` or `unknown_role`.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list | tuple):
        raise Unreadable("wrong_type")
    unused = {}
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise Unreadable("wrong_type")
        rest = plain({k: v for k, v in turn.items() if k not in _TURN_KEYS})
        if rest:
            unused[str(number)] = rest
    return [_read_turn(turn) for turn in value], unused


def user(content: str) -> Turn:
    """One canonical user message."""
    return message("user", content)


def assistant(content: str) -> Turn:
    """One canonical assistant message."""
    return message("assistant", content)


def check_conversation(turns: Sequence[Turn]) -> None:
    """Holds to what every prompted row needs: something asked, and an assistant's answer to it.

    Raises:
        Unreadable: `no_response`, `empty_response` or `empty_prompt`.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise Unreadable("no_response")
    if not turns[-1]["content"] and not turns[-1]["tool_calls"]:
        raise Unreadable("empty_response")
    # A system message alone asks nothing.
    if not any(t["content"] or t["tool_calls"] for t in turns[:-1] if t["role"] != "system"):
        raise Unreadable("empty_prompt")


def _read_turn(turn: Mapping[str, Any]) -> Turn:
    named = _first(turn, "role", "from")
    if not isinstance(named, str):
        raise Unreadable("unknown_role" if named is None else "wrong_type")
    named = named.strip().lower()
    if named not in _ROLES:
        raise Unreadable("unknown_role")
    content, calls = _first(turn, "content", "value"), turn.get("tool_calls")
    if named in _CALL_ROLES:
        content, calls = None, content
    reasoning = as_text(_first(turn, "reasoning_content", "reasoning"))
    text = _content(content)
    return message(_ROLES[named], text, reasoning=reasoning, tool_calls=as_json(calls))


def _content(value: object) -> str:
    """A message's text: a string, or text parts joined by newlines as vLLM joins them."""
    if not isinstance(value, list | tuple):
        return as_text(value)
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        # Images, audio and thinking parts have no place in a row; dropping them would lie.
        if not isinstance(text, str) or (isinstance(part, Mapping) and _is_not_text(part)):
            raise Unreadable("wrong_type")
        texts.append(text)
    return "\n".join(texts)


def _is_not_text(part: Mapping[str, Any]) -> bool:
    return part.get("type", "text") not in (None, "text", "input_text", "output_text")


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unreadable("wrong_type") from error
