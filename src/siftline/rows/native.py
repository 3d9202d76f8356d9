"""Messages as trainers and chat templates take them: no null keys, calls and tools as objects.

A row keeps structured values as JSON text, and Parquet fills the keys that one message has and
another lacks with nulls. Templates test for a key by its presence and walk through calls, so both
would end up in the rendered text. Everything that leaves a row for a template, a JSONL file or
another trainer goes through `native_message`.

The `messages` column of a published version: its type, and rows' messages in it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

EXTRAS = ("tool_call_id", "name", "weight")
"""What ties a tool's reply to its call, names a speaker, and takes a turn out of the loss."""
FUNCTION_KEYS = {"name", "arguments"}
CALL_KEYS = {"id", "type", "function"}


def native_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """One message with the keys it has a value for; `role` and `content` always.

    Args:
        message: As rows have it (`reasoning`, calls as JSON text) or as versions have it
            (`reasoning_content`, calls as a list).
    """
    result: dict[str, Any] = {"role": message["role"], "content": message.get("content") or ""}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        result["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        result["tool_calls"] = native_calls(message["tool_calls"])
    return result | {key: message[key] for key in EXTRAS if message.get(key) is not None}


def native_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation of `native_message`."""
    return [native_message(message) for message in messages]


def native_tools(tools: Any) -> list[Any] | None:
    """The tools a conversation may call, parsed; None where there are none."""
    found = json.loads(tools) if isinstance(tools, str) else tools
    if not found:
        return None
    return found if isinstance(found, list) else [found]


def native_calls(calls: Any) -> list[Any]:
    """Calls in OpenAI's form, with the arguments as objects.

    Both `{"function": {"name", "arguments"}}` and the flat `{"name", "arguments"}` are read.
    Arguments are an object or a list, or else text; a call of another form stays as it is. Calls
    that are native, or native with `text_calls`, come out the same, so that a published row keeps
    its id.

    Args:
        calls: A list of calls, one call, or the JSON text of either.
    """
    found = json.loads(calls) if isinstance(calls, str) else calls
    return [_native_call(call) for call in (found if isinstance(found, list) else [found])]


def canonical_calls(calls: str) -> str:
    """The JSON of calls in one form, by which they are known; for identity and comparison only.

    Args:
        calls: The text of a row's calls; what is no JSON is its own form.
    """
    try:
        found = native_calls(calls)
    except ValueError:
        return calls
    return json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _native_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    nested = isinstance(call.get("function"), Mapping)
    function = call["function"] if nested else call
    if not isinstance(function.get("name"), str) or not (nested or "arguments" in call):
        return call
    rest = {k: v for k, v in call.items() if v is not None}
    if not nested:
        rest = {k: v for k, v in rest.items() if k not in FUNCTION_KEYS}
    arguments = _arguments(function.get("arguments"))
    kept = {k: v for k, v in function.items() if nested or k == "name"}
    found = {"type": "function", **rest, "function": _ordered({**kept, "arguments": arguments})}
    return _ordered(found)


def _ordered(value: dict[str, Any]) -> dict[str, Any]:
    """Keys in the order of canonical JSON, so that a template shows the same from any source."""
    return dict(sorted(value.items()))


def _arguments(value: Any) -> Any:
    """Arguments as an object or a list where they are, or their text says, one; else as text.

    Text stays where reading it would lose something: a repeated key, digits, NaN.
    """
    if value is None:
        return {}
    if not isinstance(value, str):
        return value if isinstance(value, Mapping | list | tuple) else as_text(value)
    if not value.strip():
        return {}
    try:
        parsed = json.loads(
            value, parse_float=_whole_float, parse_constant=_refused, object_pairs_hook=_whole_keys
        )
    except (ValueError, ArithmeticError):
        return value
    return parsed if isinstance(parsed, dict | list) else value


def _whole_float(text: str) -> float:
    found = float(text)
    if Decimal(repr(found)) != Decimal(text):
        raise ValueError(f"{text} has more digits than a fraction holds")
    return found


def _whole_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in an object twice")
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def as_text(value: Any) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text_calls(calls: Sequence[Any]) -> list[Any]:
    """Native calls with their arguments as JSON text, as OpenAI's own interface has them."""
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            result.append(call)
            continue
        changed = {**function, "arguments": as_text(function["arguments"])}
        result.append({**call, "function": changed})
    return result


def is_function_call(call: Any) -> bool:
    """Whether a native call holds a function's name and arguments, and at most an id and a type."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return (
        isinstance(function, Mapping)
        and set(call) <= CALL_KEYS
        and set(function) == FUNCTION_KEYS
        and all(isinstance(call.get(key, ""), str) for key in ("id", "type"))
    )


PUBLISHED = {
    "reasoning_content": "reasoning",
    "tool_calls": "tool_calls",
    "tool_call_id": "tool_call_id",
    "name": "name",
    "weight": "weight",
}
"""Optional keys of a published message, and their names in a row."""
CALL_ID, OTHER_CALL = "call id", "other call"
"""Marks in `used` beside the names of fields: some call has an id, or is no plain function's."""


def used_fields(messages: pa.Array) -> set[str]:
    """Which optional fields some message of an array of conversations fills, and the marks."""
    import pyarrow.compute as pc  # 0.06 s, where a version is published

    turns = messages.flatten()
    filled = {
        name for name in PUBLISHED.values() if pc.struct_field(turns, name).null_count < len(turns)
    }
    if "tool_calls" not in filled:
        return filled
    calls = [
        call
        for text in pc.struct_field(turns, "tool_calls").drop_null().to_pylist()
        for call in native_calls(text)
    ]
    plain = [is_function_call(call) for call in calls]
    if not all(plain):
        return filled | {OTHER_CALL}
    return filled | ({CALL_ID} if any("id" in call for call in calls) else set())


def messages_type(used: Set[str]) -> pa.DataType:
    """Arrow's type of the column in a version whose rows use these fields and marks.

    Calls of another form than OpenAI's stay JSON text, in the whole version: nothing is cut.
    """
    fields = [("role", pa.string()), ("content", pa.string())]
    for published, name in PUBLISHED.items():
        if name in used:
            kind = {"tool_calls": _calls_type(used), "weight": pa.int8()}.get(name, pa.string())
            fields.append((published, kind))
    return pa.list_(pa.struct(fields))


def _calls_type(used: Set[str]) -> pa.DataType:
    if OTHER_CALL in used:
        return pa.string()
    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    identity = [("id", pa.string())] if CALL_ID in used else []
    return pa.list_(pa.struct([*identity, ("type", pa.string()), ("function", function)]))


def published(messages: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Rows' messages as values of `kind`, which must have every field that they fill."""
    import pyarrow.compute as pc  # 0.06 s, where a version is published

    whole = messages.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # of no chunk
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else whole.type.empty()
    turns = whole.flatten()
    parts = [_part(turns, field) for field in kind.value_type]
    struct = pa.StructArray.from_arrays(parts, fields=list(kind.value_type))
    ends = np.cumsum(pc.list_value_length(whole).to_numpy(zero_copy_only=False), dtype=np.int32)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
    return pa.ListArray.from_arrays(offsets, struct, type=kind)


def _part(turns: pa.Array, field: pa.Field) -> pa.Array:
    import pyarrow.compute as pc  # 0.06 s, where a version is published

    values = pc.struct_field(turns, PUBLISHED.get(field.name, field.name))
    if field.name != "tool_calls" or pa.types.is_string(field.type):
        return values.cast(field.type)
    return pa.array(_calls(values.to_pylist()), field.type)


def _calls(texts: Iterable[str | None]) -> list[list[object] | None]:
    return [None if text is None else text_calls(native_calls(text)) for text in texts]
