"""Parts that the forms of several trainers share: reasoning and calls as text, ids, masks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from siftline.rows.native import is_function_call, text_calls

Message = dict[str, Any]
Row = dict[str, Any]


class Unfit(Exception):
    """A row that a trainer has no place for; `reason` is what the export counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def text(value: Any) -> str:
    """JSON as models are shown it: spaces after colons and commas, letters as they are."""
    return json.dumps(value, ensure_ascii=False)


def with_thought(message: Mapping[str, Any]) -> str:
    """Content with the reasoning before it, in the tags and line ends of Qwen 3 and R1."""
    thought = message.get("reasoning_content")
    return (
        f"<think>\n{thought}\n</think>\n\n{message['content']}" if thought else message["content"]
    )


def functions(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name and arguments of a message's calls.

    Raises:
        Unfit: `other_calls`, for a call that is no function's, or has no object of arguments.
    """
    found = []
    for call in message.get("tool_calls", ()):
        if not is_function_call(call) or not isinstance(call["function"]["arguments"], dict):
            raise Unfit("other_calls")
        function = call["function"]
        found.append({"name": function["name"], "arguments": function["arguments"]})
    return found


def earlier(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of each message, whether it is an assistant's turn before the response: it takes no loss."""
    last = len(messages) - 1
    return [m["role"] == "assistant" and i < last for i, m in enumerate(messages)]


def flat(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages of role and content, reasoning in the content, for trainers that read no more.

    Raises:
        Unfit: `calls`, for a message that calls a tool.
    """
    if any("tool_calls" in message for message in messages):
        raise Unfit("calls")
    return [{"role": m["role"], "content": with_thought(m)} for m in messages]


def masked(messages: Sequence[Mapping[str, Any]], key: str, value: Any) -> list[Message]:
    """Messages whose earlier assistant turns carry a mark that takes them out of the loss."""
    kept = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    marks = zip(kept, earlier(messages), strict=True)
    return [{**m, key: value} if is_earlier else m for m, is_earlier in marks]


def text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages whose calls have their arguments as JSON text."""
    return [
        {**m, "tool_calls": text_calls(m["tool_calls"])} if "tool_calls" in m else m
        for m in messages
    ]


def with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Every call with an id and every reply with its call's, made up in order where missing."""
    result, waiting = [], []
    for number, message in enumerate(messages):
        changed = dict(message)
        if "tool_calls" in message:
            calls = [
                {"id": f"call_{number}_{i}", **call} for i, call in enumerate(message["tool_calls"])
            ]
            changed["tool_calls"] = calls
            waiting += [call["id"] for call in calls]
        elif message["role"] == "tool":
            if "tool_call_id" in message:
                waiting = [known for known in waiting if known != message["tool_call_id"]]
            elif waiting:
                changed["tool_call_id"] = waiting.pop(0)
            else:
                raise Unfit("reply_without_call")
        result.append(changed)
    return result
