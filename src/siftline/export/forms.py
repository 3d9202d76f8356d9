"""Parts that the forms of several trainers share: reasoning and calls as text, ids, masks.

LLaMA-Factory's ShareGPT form: roles that take turns, and calls as messages of their own role.

Rows in the forms of the other trainers, one function a kind of training; see `targets`.
"""

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


PAIR = ("prompt", "chosen", "rejected")
ABILITY = {"math": "math", "code": "code"}
"""verl's names of abilities, by verifier; other verifiers go by their own name."""
VERIFIERS = {"exact": "string_matcher", "choice": "string_matcher"}
"""open-instruct's names of verifiers, where they are not ours."""


def _tools(row: Row) -> dict[str, Any]:
    return {"tools": row["tools"]} if row.get("tools") else {}


def _json_tools(row: Row) -> dict[str, Any]:
    return {"tools": text(row["tools"])} if row.get("tools") else {}


def unmarked(row: Row) -> list[Message]:
    """The conversation without weights, for trainers that take the last turn by an option."""
    return [{k: v for k, v in m.items() if k != "weight"} for m in row["messages"]]


# ---- OpenAI


def openai_sft(row: Row) -> dict[str, Any]:
    """A line of OpenAI's chat format; turns before the response have weight 0."""
    messages = with_call_ids(masked(row["messages"], "weight", 0))
    return {"messages": text_arguments(messages), **_tools(row)}


def openai_preferences(row: Row) -> dict[str, Any]:
    """A line of OpenAI's preference format."""
    return {
        "input": {"messages": row["prompt"]},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }


def openai_rlvr(row: Row) -> dict[str, Any]:
    """A line of OpenAI's reinforcement format; a grader reads `reference_answer`."""
    return {
        "messages": row["prompt"],
        "reference_answer": row["answer"],
        "verifier": row["verifier"],
    }


# ---- axolotl


def axolotl_sft(row: Row) -> dict[str, Any]:
    """A row of type `chat_template`; its own loader parses calls and tools from text."""
    return {
        "messages": text_arguments(masked(row["messages"], "train", False)),
        **_json_tools(row),
    }


def axolotl_preferences(row: Row) -> dict[str, Any]:
    """Prompt, chosen and rejected; its DPO strategy reads role and content."""
    return {name: flat(row[name]) for name in PAIR}


def pairs(row: Row) -> dict[str, Any]:
    """Prompt, chosen and rejected as lists of messages."""
    return {name: row[name] for name in PAIR}


def prompts(row: Row) -> dict[str, Any]:
    """Prompt, answer and verifier, as the version has them."""
    return {name: row[name] for name in ("prompt", "answer", "verifier")}


# ---- ms-swift


def swift_sft(row: Row) -> dict[str, Any]:
    """Messages of role and content; a call is a message of its own, reasoning is content."""
    turns: list[Message] = []
    for message, unlearnt in zip(row["messages"], earlier(row["messages"]), strict=True):
        mark = {"loss": False} if unlearnt else {}
        content, calls = with_thought(message), functions(message)
        if content or not calls:
            turns.append({"role": message["role"], "content": content, **mark})
        turns += [{"role": "tool_call", "content": text(call), **mark} for call in calls]
    return {"messages": turns, **_json_tools(row)}


def swift_preferences(row: Row) -> dict[str, Any]:
    """The chosen conversation and the rejected response."""
    prompt, chosen, rejected = (flat(row[name]) for name in PAIR)
    messages = masked([*prompt, *chosen], "loss", False)  # it learns every turn without a mark
    return {"messages": messages, "rejected_response": rejected[-1]["content"]}


def swift_rlvr(row: Row) -> dict[str, Any]:
    """Prompt and `solution`, which its reward functions read."""
    return {"messages": row["prompt"], "solution": row["answer"], "verifier": row["verifier"]}


# ---- verl


def verl_sft(row: Row) -> dict[str, Any]:
    """Conversation and tools as JSON text, which `verl_dataset` parses."""
    return {"messages": text(unmarked(row)), "tools": text(row.get("tools"))}


def verl_rlvr(row: Row) -> dict[str, Any]:
    """A prompt with its reward model."""
    verifier = row["verifier"]
    return {
        "data_source": f"siftline/{verifier}",
        "prompt": row["prompt"],
        "ability": ABILITY.get(verifier, verifier),
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"id": row["id"], "verifier": verifier},
    }


# ---- OpenRLHF


def openrlhf_sft(row: Row) -> dict[str, Any]:
    """A conversation whose last message is the response.

    Raises:
        Unfit: `tools`, which OpenRLHF does not show to the template.
    """
    if row.get("tools"):
        raise Unfit("tools")
    return {"messages": unmarked(row)}


# ---- open-instruct


def open_instruct_sft(row: Row) -> dict[str, Any]:
    """A conversation and its tools."""
    return {"messages": unmarked(row), **_json_tools(row)}


def open_instruct_preferences(row: Row) -> dict[str, Any]:
    """Two whole conversations."""
    return {name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")}


def open_instruct_rlvr(row: Row) -> dict[str, Any]:
    """A conversation whose last message, cut off before sampling, is the answer."""
    return {
        "messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}],
        "ground_truth": row["answer"],
        "dataset": VERIFIERS.get(row["verifier"], row["verifier"]),
    }
