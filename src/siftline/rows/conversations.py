"""The `messages` column of a published version: its type, and rows' messages in it.

A version has the keys that one of its rows fills and no others: plain conversations are
`{role, content}`. Reasoning goes by the name trainers read, `reasoning_content`, and calls are
OpenAI's: objects whose arguments are JSON text, the one part that no fixed type can hold.
"""

from collections.abc import Iterable, Set

import numpy as np
import pyarrow as pa

from siftline.rows.native import is_function_call, native_calls, text_calls

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
