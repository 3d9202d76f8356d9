"""The published conversation: keys that rows need, native calls, and nothing lost on the way."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import siftline
from siftline.ingest.readers import Source, read_sources
from siftline.rows.native import (
    messages_type,
    native_calls,
    native_messages,
    native_tools,
    published,
    used_fields,
)
from siftline.rows.schema import MESSAGE, message

SPEC = importlib.util.spec_from_file_location(
    "versions", (Path(__file__).parents[1] / "versions.py")
)
VERSIONS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(VERSIONS)
EVERYTHING = VERSIONS.PLAIN | VERSIONS.REASONED | VERSIONS.TOOLED


def keys(folder):
    kind = pq.read_table(folder / "data").schema.field("messages").type
    return [field.name for field in kind.value_type]


def native_of(shapes):
    rows = VERSIONS.row_table(shapes).to_pylist()
    return {r["id"]: (native_messages(r["messages"]), native_tools(r["tools"])) for r in rows}


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        (VERSIONS.PLAIN, []),
        (VERSIONS.REASONED, ["reasoning_content"]),
        (VERSIONS.PLAIN | {"n": [message("user", "q", name="Ann"), VERSIONS.SAID]}, ["name"]),
        (
            VERSIONS.PLAIN
            | {"w": [VERSIONS.USER, message("assistant", "x", weight=0), *VERSIONS.PLAIN["plain"]]},
            ["weight"],
        ),
        (EVERYTHING, ["reasoning_content", "tool_calls", "tool_call_id", "name"]),
    ],
    ids=["plain", "reasoned", "named", "weighted", "everything"],
)
def test_a_version_has_the_keys_its_rows_need(tmp_path, shapes, wanted):
    folder = VERSIONS.make_version(tmp_path / "v", shapes)
    assert keys(folder) == ["role", "content", *wanted]
    rows = native_of(shapes)
    data = siftline.load(folder)
    assert {row["id"]: row["messages"] for row in data} == {i: m for i, (m, _) in rows.items()}


def test_calls_and_tools_come_back_as_objects(tmp_path):
    folder = VERSIONS.make_version(tmp_path / "v", EVERYTHING)
    kind = pq.read_table(folder / "data").schema.field("messages").type.value_type
    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    assert kind.field("tool_calls").type == pa.list_(call)
    rows = native_of(EVERYTHING)
    for row in siftline.load(folder.parent):
        assert (row["messages"], row["tools"]) == rows[row["id"]]
    for row in siftline.load(folder, form="prompt_completion"):
        assert "messages" not in row
        assert row["prompt"] + row["completion"] == rows[row["id"]][0]
        assert [m["role"] for m in row["completion"]] == ["assistant"]


def test_versions_of_different_keys_stack(tmp_path):
    folders = [
        VERSIONS.make_version(tmp_path / name, shapes)
        for name, shapes in (
            ("plain", VERSIONS.PLAIN),
            ("reasoned", VERSIONS.REASONED),
            ("tooled", VERSIONS.TOOLED),
        )
    ]
    rows = native_of(EVERYTHING)
    stacked = siftline.load(*folders)
    assert [row["id"] for row in stacked] == [r["id"] for f in folders for r in siftline.load(f)]
    assert {row["id"]: (row["messages"], row["tools"]) for row in stacked} == rows
    files = [f / "data/train-00000-of-00001.parquet" for f in folders]
    frames = pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
    assert {r["id"]: native_messages(r["messages"]) for r in frames.to_dicts()} == {
        identity: messages for identity, (messages, _) in rows.items()
    }


def test_training_sees_the_same_tokens_in_versions_as_in_rows(tmp_path, tiny):
    import trl

    from siftline.training.material import read_rows
    from siftline.training.schedule import tokenize_rows
    from siftline.training.sft import FineTune

    template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    tokenizer = tiny.make_tokenizer(template=template)
    folders = [
        VERSIONS.make_version(tmp_path / name, shapes)
        for name, shapes in (
            ("plain", VERSIONS.PLAIN),
            ("rest", VERSIONS.REASONED | VERSIONS.TOOLED),
        )
    ]
    files = [folder / "data/train-00000-of-00001.parquet" for folder in folders]
    given = tokenize_rows(read_rows(files, FineTune()), tokenizer, 10**6)
    wanted = tokenize_rows(VERSIONS.row_table(EVERYTHING), tokenizer, 10**6)
    assert given.skipped.height == wanted.skipped.height == 0

    def by_id(rows):
        pairs = ((identity, rows.row(i)) for i, identity in enumerate(rows.ids))
        return {identity: (tokens.tolist(), start) for identity, (tokens, start) in pairs}

    assert by_id(given) == by_id(wanted)
    assert len(given.ids) == len(EVERYTHING)


def test_calls_of_another_form_stay_text_and_are_not_cut(tmp_path):
    odd = [{"kind": "search", "query": {"q": 1}}]
    chat = [VERSIONS.USER, message("assistant", "", tool_calls=json.dumps(odd))]
    folder = VERSIONS.make_version(tmp_path / "v", EVERYTHING | {"odd": chat})
    kind = pq.read_table(folder / "data").schema.field("messages").type.value_type
    assert kind.field("tool_calls").type == pa.string()
    found = [row["messages"][-1] for row in siftline.load(folder)]
    assert {"role": "assistant", "content": "", "tool_calls": odd} in found


def test_numbers_that_datasets_rounds_are_said(tmp_path):
    chat = [VERSIONS.USER, VERSIONS.calling("", VERSIONS.call("f", x=0.12345678901234568))]
    folder = VERSIONS.make_version(tmp_path / "v", {"call": chat})
    with pytest.warns(UserWarning, match="rounds fractions of more than 15 digits in 1 messages"):
        siftline.load(folder)
    chat = [VERSIONS.USER, VERSIONS.calling("", VERSIONS.call("f", x=10**40))]
    folder = VERSIONS.make_version(tmp_path / "w", {"call": chat})
    with pytest.raises(ValueError, match="datasets can't read"):
        siftline.load(folder)


def test_importing_siftline_is_light_and_errors_name_the_remedy(tmp_path):
    code = "import siftline, sys; print(sorted(m for m in sys.modules if m[:8] in "
    code += "('datasets', 'pyarrow', 'polars', 'torch')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "load" in siftline.__all__
    with pytest.raises(ValueError, match="no published version"):
        siftline.load(tmp_path)
    with pytest.raises(ValueError, match="no folder to load"):
        siftline.load()
    folder = VERSIONS.make_version(tmp_path / "v", VERSIONS.PLAIN)
    with pytest.raises(ValueError, match="no config 'x': it has default, preferences, rlvr"):
        siftline.load(folder, config="x")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALL = st.fixed_dictionaries(
    {"name": TEXT.filter(bool), "arguments": st.dictionaries(TEXT, VALUE, max_size=3)}
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": TEXT,
        "reasoning": st.none() | TEXT.filter(bool),
        "calls": st.lists(CALL, max_size=2),
        "tool_call_id": st.none() | TEXT.filter(bool),
        "name": st.none() | TEXT.filter(bool),
        "weight": st.none() | st.just(0),
    }
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(TURN, min_size=1, max_size=4), min_size=1, max_size=4))
def test_any_conversation_survives(chats):
    rows = []
    for chat in chats:
        turns = []
        for turn in chat:
            calls = turn.pop("calls")
            written = [{"type": "function", "function": c} for c in calls]
            turns.append(message(**turn, tool_calls=json.dumps(written) if written else None))
        rows.append(turns)
    array = pa.array(rows, pa.list_(MESSAGE))
    kind = messages_type(used_fields(array))
    column = published(pa.chunked_array([array]), kind)
    assert [native_messages(chat) for chat in column.to_pylist()] == [
        native_messages(chat) for chat in rows
    ]
    filled = {name for chat in rows for turn in native_messages(chat) for name in turn}
    assert {field.name for field in kind.value_type} == filled


def test_calls_are_read_from_every_form_in_use():
    wanted = [{"function": {"arguments": {"a": 1}, "name": "f"}, "type": "function"}]
    for form in (
        [{"name": "f", "arguments": {"a": 1}}],
        {"name": "f", "arguments": '{"a": 1}'},
        [{"function": {"name": "f", "arguments": '{"a":1}'}}],
        [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": None}],
    ):
        assert native_calls(form) == native_calls(json.dumps(form)) == wanted
    assert native_calls([{"name": "f", "arguments": "{a"}])[0]["function"]["arguments"] == "{a"
    assert native_calls([{"name": "f"}, 3]) == [{"name": "f"}, 3]


WRITTEN = st.one_of(
    st.dictionaries(TEXT, VALUE | st.floats(allow_nan=False), max_size=3),
    st.dictionaries(TEXT, VALUE | st.floats(allow_nan=False), max_size=3).map(json.dumps),
    st.lists(VALUE, max_size=2),
    st.sampled_from(
        ["", " ", "null", "5", "[1]", "no JSON", '{"a":1,"a":2}', '{"a": 1.0000000000000000001}']
    ),
    st.sampled_from(['{"a": NaN}', '{"a": 1e999}', '{"a": null}', '"{}"', None, 7, True]),
)
FUNCTION = st.fixed_dictionaries({"name": TEXT.filter(bool), "arguments": WRITTEN})
ANY_CALL = st.one_of(
    FUNCTION,
    st.builds(
        lambda function, more: {"function": function} | more,
        FUNCTION,
        st.fixed_dictionaries(
            {}, optional={"id": TEXT.filter(bool) | st.none(), "type": st.just("function")}
        ),
    ),
)
OTHER = st.fixed_dictionaries({"tool": TEXT.filter(bool), "input": VALUE})
ASKED = st.fixed_dictionaries({"role": st.just("user"), "content": st.just("Do it.")})


def replying(call):
    """An assistant's message in the form that files have it in."""
    calls = st.lists(call, max_size=2)
    return st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.just("Done.")},
        optional={
            "reasoning_content": TEXT.filter(str.strip),
            "tool_calls": st.one_of(calls, calls.map(json.dumps), call),
            "name": TEXT.filter(bool),
        },
    )


RESULT = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": TEXT},
    optional={"tool_call_id": TEXT.filter(bool), "name": TEXT.filter(bool)},
)


def rows_of(path):
    batches = list(read_sources([Source(str(path), source="s")]))
    assert sum(batch.quarantine.num_rows for batch in batches) == 0
    return pa.concat_tables([batch.rows for batch in batches])


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_published_version_read_back_has_the_ids_of_its_rows(data):
    call = data.draw(st.sampled_from([ANY_CALL, ANY_CALL | OTHER]))
    chat = st.tuples(ASKED, replying(call), st.lists(RESULT, max_size=2), replying(call))
    chats = data.draw(st.lists(chat, min_size=1, max_size=3))
    records = [{"messages": [ask, first, *results, last]} for ask, first, results, last in chats]
    for record in records:
        if data.draw(st.booleans()):
            record["tools"] = VERSIONS.TOOLS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        rows = rows_of(folder / "in.jsonl")
        kind = messages_type(used_fields(rows["messages"].combine_chunks()))
        column = published(rows["messages"], kind)
        table = pa.table({"messages": column, "tools": rows["tools"]})
        pq.write_table(table, folder / "version.parquet")
        native = [
            {"messages": native_messages(row["messages"]), "tools": native_tools(row["tools"])}
            for row in table.to_pylist()
        ]
        lines = "".join(json.dumps(row) + "\n" for row in native)
        (folder / "native.jsonl").write_text(lines)
        wanted = rows["id"].to_pylist()
        assert rows_of(folder / "version.parquet")["id"].to_pylist() == wanted
        assert rows_of(folder / "native.jsonl")["id"].to_pylist() == wanted
