"""Records that are too large are one faulty record each: named, and the rest goes on."""

import gzip
import io
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest import parse as limits
from siftline.ingest import records
from siftline.ingest.parse import bounded_lines, nesting_fault, record_fault
from siftline.ingest.readers import Source, read_sources

GOOD = {"prompt": "6 * 7?", "completion": "42"}
LINE = json.dumps(GOOD).encode() + b"\n"
JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\ab', max_size=6),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=30,
)  # fmt: skip


def nested(depth, inner="1"):
    return '{"prompt": "?", "completion": "!", "x": ' + "[" * depth + inner + "]" * depth + "}"


def depth_of(value):
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return 1 + max(map(depth_of, parts), default=0)
    return 0


@given(JSON, st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_depth_is_that_of_the_value(value, most):
    for text in (json.dumps(value), json.dumps(value, indent=1)):
        assert (nesting_fault(text.encode(), most) == "too_deep") == (depth_of(value) > most)
        cut = nesting_fault(text.encode()[:-1], most)  # a bracket is missing, or nothing much
        assert cut in (None, "invalid_json" if text[-1] in "]}" else "too_deep")
    assert (record_fault(value, depth=most) == "too_deep") == (depth_of(value) > most)


@given(
    st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=20),
    st.integers(1, 20),
)
@settings(max_examples=150, deadline=None)
def test_lines_are_those_of_the_file_and_long_ones_are_told(lines, most):
    found = list(bounded_lines(io.BytesIO(b"\n".join(lines)), most))
    whole = b"\n".join(lines).split(b"\n")
    whole = whole[:-1] if whole[-1] == b"" else whole
    assert [n for n, _, _ in found] == list(range(1, len(whole) + 1))
    for (_, raw, why), line in zip(found, whole, strict=True):
        if why == "too_long":
            assert len(line) >= most
        else:
            assert raw.rstrip(b"\n") == line


def test_sizes_are_those_of_the_texts():
    assert record_fault({"a": "x" * 99}, most=200) is None
    assert record_fault({"a": "x" * 99}, most=100) == "too_long"
    assert record_fault({"a": ["x"] * 99}, most=100) == "too_long"
    assert record_fault({"x" * 99: 1}, most=100) == "too_long"


def outcomes(path, **options):
    rows, faults = [], {}
    for batch in read_sources([Source(str(path), **options)]):
        rows += batch.provenance["line"].to_pylist()
        faults |= {q["line"]: q["reason"] for q in batch.quarantine.to_pylist()}
    return rows, faults


@pytest.fixture
def small(monkeypatch):
    for module in (limits, records):
        monkeypatch.setattr(module, "RECORD_BYTES", 5000)
    monkeypatch.setattr(records, "bounded_lines", lambda s: bounded_lines(s, 5000))
    monkeypatch.setattr(records, "record_fault", lambda value: record_fault(value, 5000))


def test_jsonl(tmp_path, small):
    long = json.dumps({"prompt": "?", "completion": "x" * 9000}).encode() + b"\n"
    deep, fine = nested(200).encode() + b"\n", nested(90).encode() + b"\n"
    endless = b"[" * 4000 + b"\n"
    lines = [LINE, long, deep, fine, endless, LINE, long[:-1]]
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.json", bytes)):
        (tmp_path / name).write_bytes(pack(b"".join(lines)))
        rows, faults = outcomes(tmp_path / name)
        assert rows == [1, 4, 6]
        assert faults == {2: "too_long", 3: "too_deep", 5: "invalid_json", 7: "too_long"}


def test_other_formats(tmp_path, small, monkeypatch):
    wanted = ([1, 3], {2: "too_long"})
    texts = ["42", "x" * 9000, "43"]
    table = pa.table({"prompt": ["?"] * 3, "completion": texts})
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    array = [{"prompt": "?", "completion": text} for text in texts]
    (tmp_path / "a.json").write_text(json.dumps(array, indent=1))
    csv = "".join(f"?,{text}\n" for text in texts)
    (tmp_path / "a.csv").write_text("prompt,completion\n" + csv)
    for name in ("a.parquet", "a.arrow", "a.json", "a.csv"):
        assert outcomes(tmp_path / name) == wanted, name
    (tmp_path / "deep.json").write_text(
        f"[{json.dumps(GOOD)},\n{nested(200)},\n{json.dumps(GOOD)}]"
    )
    assert outcomes(tmp_path / "deep.json") == ([1, 3], {2: "too_deep"})
    monkeypatch.setattr(records, "FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"more than 1,000 bytes.* one object a line"):
        outcomes(tmp_path / "a.json")


def test_a_line_of_gigabytes_in_a_small_gzip_takes_no_memory(tmp_path):
    """1 GB in a process that may have 1.2 GB at all, imports included."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(LINE + b'{"prompt": "')
        for _ in range(64):
            file.write(b"a" * (16 << 20))
        file.write(b'"}\n' + LINE)
    assert path.stat().st_size < 8 << 20
    code = (
        "import sys, resource\n"
        "from siftline.ingest.readers import Source, read_sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "(batch,) = read_sources([Source(sys.argv[1])])\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(batch.provenance['line'].to_pylist(), batch.quarantine['reason'].to_pylist(), grown)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    lines, reasons, grown = said.stdout.decode().rsplit(maxsplit=2)
    assert (lines, reasons) == ("[1, 3]", "['too_long']")
    assert int(grown) < 400 << 10
