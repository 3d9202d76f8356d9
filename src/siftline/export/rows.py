"""Rows in the forms of the other trainers, one function a kind of training; see `targets`.

Where a function raises `Unfit`, the trainer has no place for the row.
"""

from typing import Any

from siftline.export.forms import (
    Message,
    Row,
    Unfit,
    earlier,
    flat,
    functions,
    masked,
    text,
    text_arguments,
    with_call_ids,
    with_thought,
)

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
