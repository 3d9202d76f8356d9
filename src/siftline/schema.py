"""The row: its columns, their types, and how ids are made.

A row is one conversation whose last message is the assistant's response. Its `prompt_id` hashes
everything before that response, so rows that answer one prompt share a prefix and therefore a
bucket. Its `id` adds a hash of the rest, so a row keeps its id across runs, machines, layouts and
input orders. Identical input rows get identical ids, which is what lets ingestion collapse them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import polars as pl
import pyarrow as pa

from siftline.kernels.normalization import normalized
from siftline.native import canonical_calls

ROLES = ("system", "user", "assistant", "tool")
HALF_ID = 20
"""Hex digits of each half of an id: 80 bits, collision odds 4e-7 at 1e9 prompts."""

MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("reasoning", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("tool_call_id", pa.string()),  # of the call that a tool message answers
        pa.field("name", pa.string()),  # who speaks: the tool, or one of several people
        pa.field("weight", pa.int8()),  # 0: an assistant turn that carries no loss
    ]
)
EXTRAS = ("tool_call_id", "name", "weight")
"""Fields of a message that its hash holds only where they are filled: ids are older than they."""

ROW = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("answer_from", pa.string()),  # "independent" of the response, or "response"
        pa.field("source", pa.string()),
        pa.field("conversation_id", pa.string()),
        pa.field("tools", pa.string()),
        pa.field("copies", pa.int32(), nullable=False),
    ]
)

PROVENANCE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("leftover", pa.string()),  # JSON object of the input columns no mapping used
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.string()),
    ]
)

ADDED = pa.schema(
    [*ROW, pa.field("parent_id", pa.string(), nullable=False), pa.field("origin", pa.string())]
)


def messages_type() -> pl.DataType:
    """Polars' type of a conversation; inferred from rows, fields null in the first are lost."""
    frame = pl.from_arrow(pa.Table.from_batches([], ROW))
    assert isinstance(frame, pl.DataFrame)
    return frame.schema["messages"]


def canonical_text(text: str) -> str:
    """Returns `text` in NFC, with Unix line ends and no white space around it.

    For identity and comparison only: rows keep their text to the character.
    """
    if text.isascii() and "\r" not in text:
        return text.strip()
    return normalized("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def message(
    role: str,
    content: str | None,
    *,
    reasoning: str | None = None,
    tool_calls: str | None = None,
    tool_call_id: str | None = None,
    name: str | None = None,
    weight: int | None = None,
) -> dict[str, Any]:
    """Builds one message with every field of `MESSAGE` present, its text as it is.

    Args:
        role: One of `ROLES`.
        content: The text; None is the empty one.
        reasoning: The model's thoughts before the content.
        tool_calls: JSON of what it calls.
        tool_call_id: Of the call that a tool message answers.
        name: Of the tool or the speaker.
        weight: 0 where an assistant turn carries no loss.
    """
    return {
        "role": role,
        "content": content or "",
        "reasoning": reasoning or None,
        "tool_calls": (tool_calls or "").strip() or None,
        "tool_call_id": tool_call_id or None,
        "name": name or None,
        "weight": weight,
    }


def digest(*parts: Any) -> str:
    """Hashes JSON-serialisable `parts` to 40 hex digits; the same on every machine."""
    payload = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(payload.encode(), digest_size=20).hexdigest()


def _hashable(messages: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """What a conversation is known by: canonical texts, so that it has one id however written."""
    return [_parts(message) for message in messages]


def _parts(message: Mapping[str, Any]) -> list[Any]:
    reasoning, calls = message.get("reasoning"), message.get("tool_calls")
    parts = [
        message["role"],
        canonical_text(message["content"] or ""),
        canonical_text(reasoning) if reasoning else None,
        canonical_text(canonical_calls(calls)) if calls else None,
    ]
    extras = {name: message[name] for name in EXTRAS if message.get(name) is not None}
    return [*parts, extras] if extras else parts


def prompt_id(messages: Sequence[Mapping[str, Any]], tools: str | None = None) -> str:
    """Hashes everything before the last assistant turn; plain text hashes the text itself."""
    return _ids(_hashable(messages), tools, None, None)[0]


def row_id(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: str | None = None,
    answer: str | None = None,
    source: str | None = None,
) -> str:
    """Makes the 40-digit id: 20 of the prompt's hash, 20 of hash(messages, answer, source)."""
    return "".join(_ids(_hashable(messages), tools, answer, source))


def _ids(
    parts: list[list[Any]], tools: str | None, answer: str | None, source: str | None
) -> tuple[str, str]:
    """Both halves of an id; the texts are made canonical once.

    Raises:
        UnicodeEncodeError: for a text with a lone surrogate.
    """
    answer = canonical_text(answer) if answer is not None else None
    tools = canonical_text(tools) if tools else tools
    halves = ("prompt", parts[:-1] or parts, tools), ("row", parts, answer, source)
    try:  # a quarter of json's time; the same bytes, for there are no fractions among the parts
        raw = [orjson.dumps(half, option=orjson.OPT_SORT_KEYS) for half in halves]
    except TypeError:
        first, second = (digest(*half) for half in halves)
    else:
        first, second = (hashlib.blake2b(half, digest_size=20).hexdigest() for half in raw)
    return first[:HALF_ID], second[:HALF_ID]


def make_row(
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: str | None = None,
    answer_from: str | None = None,
    source: str | None = None,
    conversation_id: str | None = None,
    tools: str | None = None,
    copies: int = 1,
) -> dict[str, Any]:
    """Builds one row of `ROW` from messages (see `message`).

    Raises:
        ValueError: if there is no message, or the last one is not the assistant's.
    """
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"the last message must be the assistant's response, found {last}")
    identity = row_id(messages, tools=tools, answer=answer, source=source)
    return {
        "id": identity,
        "prompt_id": identity[:HALF_ID],
        "messages": list(messages),
        "answer": answer,
        "answer_from": (answer_from or "independent") if answer is not None else None,
        "source": source,
        "conversation_id": conversation_id,
        "tools": tools,
        "copies": copies,
    }


def bucket_of(identity: str, buckets: int) -> int:
    """The bucket of a row or prompt id: its leading bits, so all answers to a prompt share one."""
    assert buckets & (buckets - 1) == 0, f"buckets must be a power of two, not {buckets}"
    return int(identity[:8], 16) * buckets >> 32


def text_view(rows: pa.Table, *, everything: bool = False) -> pl.DataFrame:
    """Flattens rows to `id, prompt_id, prompt, response, answer, answer_from, source` strings.

    `prompt` joins the contents of all messages before the response with newlines; templating for a
    model is done from the messages themselves, never from this view.

    Args:
        rows: Columns of `ROW`.
        everything: Also take in reasoning, tool calls and tools: rows that differ in these alone
            are not the same.
    """
    frame = pl.from_arrow(rows.select(["id", "prompt_id", "answer", "answer_from", "source"]))
    assert isinstance(frame, pl.DataFrame)
    fields = ("reasoning", "content", "tool_calls") if everything else ("content",)
    tools = rows.column("tools").to_pylist() if everything else [None] * rows.num_rows
    prompts, responses = [], []
    for messages, offered in zip(rows.column("messages").to_pylist(), tools, strict=True):
        told = ["\n".join(m[f] for f in fields if m[f]) for m in messages]
        prompts.append("\n".join([*([offered] if offered else []), *told[:-1]]))
        responses.append(told[-1])
    return frame.with_columns(
        pl.Series("prompt", prompts, dtype=pl.String),
        pl.Series("response", responses, dtype=pl.String),
    )
