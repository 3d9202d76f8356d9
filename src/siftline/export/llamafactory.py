"""LLaMA-Factory's ShareGPT form: roles that take turns, and calls as messages of their own role."""

from collections.abc import Sequence
from typing import Any

from siftline.export.forms import Message, Row, Unfit, functions, text, with_thought

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"
"""Between the replies of several tools; LLaMA-Factory has one message for all of them."""
CALL_TAGS = "<tool_call>", "</tool_call>"


def sft(row: Row) -> dict[str, Any]:
    """A row of the `sharegpt` formatting.

    Raises:
        Unfit: `turns` where its roles don't take turns, or `other_calls`.
    """
    return {
        "messages": _turns(row["messages"], 0),
        "tools": text(row["tools"]) if row.get("tools") else "",
    }


def preferences(row: Row) -> dict[str, Any]:
    """A row of a ranking data set."""
    chosen, rejected = (_turn(row[name][-1]) for name in ("chosen", "rejected"))
    return {"messages": _turns(row["prompt"], 1), "chosen": chosen, "rejected": rejected}


def _turns(messages: Sequence[Message], over: int) -> list[Message]:
    turns: list[Message] = []
    for message in messages:
        turn = _turn(message)
        if turn["role"] == "observation" and turns and turns[-1]["role"] == "observation":
            turns[-1]["content"] += BETWEEN_RESULTS + turn["content"]
        else:
            turns.append(turn)
    said = turns[1:] if turns[0]["role"] == "system" else turns
    roles = (("user", "observation"), ("assistant", "function_call"))
    alternate = all(turn["role"] in roles[i % 2] for i, turn in enumerate(said))
    if not alternate or len(said) % 2 != over:
        raise Unfit("turns")
    return turns


def _turn(message: Message) -> Message:
    content = with_thought(message)
    said = functions(message)
    if not said:
        role = "observation" if message["role"] == "tool" else message["role"]
        return {"role": role, "content": content}
    calls = text(said)
    if CALL_TAGS[1] in calls or CALL_TAGS[0] in content:
        raise Unfit("other_calls")
    if message["content"]:  # words beside calls go where it looks for a thought
        calls = "\n" + calls.join(CALL_TAGS)
    return {"role": "function_call", "content": content + calls}


def configuration(name: str, files: dict[str, str]) -> dict[str, Any]:
    """dataset_info.json.

    Args:
        name: What the data set is called.
        files: File by kind, `sft` and `preferences`.
    """
    found: dict[str, Any] = {}
    if "sft" in files:
        found[f"{name}_sft"] = {
            "file_name": files["sft"],
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "tools": "tools"},
            "tags": TAGS,
        }
    if "preferences" in files:
        found[f"{name}_preferences"] = {
            "file_name": files["preferences"],
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
            "tags": TAGS,
        }
    return found
