"""Properties of ingestion on arbitrary conversations."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.readers import Source, read_sources
from siftline.ingest.turns import plain, to_json
from siftline.rows import schema

WORDS = st.text(min_size=1, max_size=30).filter(lambda s: s.strip())
MIDDLE = st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text(max_size=30))
CONVERSATION = st.builds(
    lambda system, first, middle, last: [
        *([("system", system)] if system else []),
        ("user", first),
        *middle,
        ("assistant", last),
    ],
    st.none() | WORDS,
    WORDS,
    st.lists(MIDDLE, max_size=3),
    WORDS,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def ids(path: Path) -> list[str]:
    batches = list(read_sources([Source(str(path), source="s")], batch_rows=2))
    assert sum(b.quarantine.num_rows for b in batches) == 0
    return [i for b in batches for i in b.rows["id"].to_pylist()]


@settings(max_examples=60, deadline=None)
@given(st.lists(CONVERSATION, min_size=1, max_size=4))
def test_one_conversation_has_one_id_in_every_format_and_layout(conversations):
    want = [
        schema.row_id([schema.message(role, text) for role, text in c], source="s")
        for c in conversations
    ]
    records = [{"messages": [{"role": r, "content": t} for r, t in c]} for c in conversations]
    sharegpt = [{"conversations": [{"from": r, "value": t} for r, t in c]} for c in conversations]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records))
        (folder / "a.jsonl").write_bytes("\n".join(lines).encode())
        (folder / "b.json").write_bytes(json.dumps(sharegpt, indent=1).encode())
        pq.write_table(pa.Table.from_pylist(records), folder / "c.parquet")
        table = pa.Table.from_pylist(sharegpt)
        with pa.ipc.new_stream(str(folder / "d.arrow"), table.schema) as writer:
            writer.write_table(table)
        for file in ("a.jsonl", "b.json", "c.parquet", "d.arrow"):
            assert ids(folder / file) == want, file


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=12))
def test_every_line_of_any_bytes_is_a_row_or_a_fault(lines):
    lines = [line.replace(b"\n", b" ") for line in lines]
    good = b'{"text":"fine"}'
    content = b"\n".join([good, *lines, good])
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.jsonl"
        path.write_bytes(content)
        batches = list(read_sources([Source(str(path), layout="text")]))
    found = [n for b in batches for n in b.provenance["line"].to_pylist()]
    found += [n for b in batches for n in b.quarantine["line"].to_pylist()]
    blank = {i for i, line in enumerate(lines, start=2) if not line.strip()}
    assert sorted(found) == [i for i in range(1, len(lines) + 3) if i not in blank]


@given(JSON)
def test_plain_values_are_json_that_reads_back(value):
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == plain(value)
    assert to_json(json.loads(text)) == text
