"""What can't be read: one fault a record, by exact line or row number, and the rest stays."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.ingest.readers import Source, read_sources


def read(source: Source, **options) -> tuple[list[dict], list[dict], list[dict]]:
    batches = list(read_sources([source], **options))
    return (
        [row for b in batches for row in b.rows.to_pylist()],
        [row for b in batches for row in b.provenance.to_pylist()],
        [row for b in batches for row in b.quarantine.to_pylist()],
    )


GOOD = b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n'


def chat(*turns: tuple) -> bytes:
    body = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": body}).encode() + b"\n"


BAD_LINES = [
    (b'{"messages": [\n', "invalid_json"),
    (b'{"messages":"caf\xe9"}\n', "invalid_utf8"),
    (
        b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"\\ud800"}]}\n',
        "invalid_utf8",
    ),
    (b'["a"]\n', "not_an_object"),
    (b'{"other": 1}\n', "missing_column"),
    (b'{"messages": 3}\n', "wrong_type"),
    (b'{"messages": "no json"}\n', "wrong_type"),
    (chat(("user", {"a": 1}), ("assistant", "a")), "wrong_type"),
    (chat(("user", [{"type": "image_url", "text": "x"}]), ("assistant", "a")), "media"),
    (chat(("user", [{"type": "chart", "text": "x"}]), ("assistant", "a")), "wrong_type"),
    (chat(("user", True), ("assistant", "a")), "wrong_type"),
    (b'{"messages": []}\n', "no_response"),
    (chat(("user", "q"), ("assistant", "a"), ("user", "q2")), "no_response"),
    (chat(("user", " \n"), ("assistant", "a")), "empty_prompt"),
    (chat(("system", "s"), ("assistant", "a")), "empty_prompt"),
    (chat(("user", "q"), ("assistant", " ")), "empty_response"),
    (chat(("user", "q"), ("narrator", "a")), "unknown_role"),
    (b'{"messages":' + b"[" * 100_000 + b"}\n", "invalid_json"),
]


def test_each_bad_line_is_quarantined_alone_with_its_number(tmp_path):
    lines = [GOOD, b"\n"]
    want = []
    for raw, reason in BAD_LINES:
        lines += [raw, GOOD]
        want.append((len(lines) - 1, reason))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(lines))
    rows, provenance, quarantine = read(Source(str(path)), batch_rows=3)
    assert [(q["line"], q["reason"]) for q in quarantine] == want
    assert {q["file"] for q in quarantine} == {"bad.jsonl"}
    assert all(len(q["excerpt"]) <= 200 for q in quarantine)
    assert quarantine[1]["excerpt"] == '{"messages":"caf\ufffd"}'
    good = [i for i, raw in enumerate(lines, start=1) if raw == GOOD]
    assert [p["line"] for p in provenance] == good
    assert len({r["id"] for r in rows}) == 1


def test_two_system_messages_and_no_user_message(tmp_path):
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turns = [{"role": "system", "content": "a"}, *asked]
    records = [{"messages": turns, "system": s} for s in ("a", "b", None)]
    records.append({"messages": [{"role": "tool", "content": "t"}, asked[1]], "system": None})
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows, _, quarantine = read(Source(str(path), instruction="Go."))
    assert [(q["line"], q["reason"]) for q in quarantine] == [
        (2, "two_system_messages"),
        (4, "no_user_message"),
    ]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]


def test_csv_faults_cost_their_row_only(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer\r\n"q\n1",a\r\nq2,a,extra\r\nq3\r\n\r\nq4,caf\xe9\r\n'
        b'"q5"x,a\r\nq6,a\r\nq7,\r\n'
    )
    rows, provenance, quarantine = read(Source(str(path)))
    assert [p["line"] for p in provenance] == [1, 6]
    assert rows[0]["messages"][0]["content"] == "q\n1"
    assert [(q["line"], q["reason"]) for q in quarantine] == [
        (2, "too_many_fields"),
        (3, "too_few_fields"),
        (4, "invalid_utf8"),
        (5, "invalid_csv"),
        (7, "empty_response"),
    ]
    assert quarantine[0]["excerpt"] == "q2,a,extra"


def test_csv_holds_fields_longer_than_pythons_limit(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question,answer\nq," + "a" * 300_000 + "\n")
    rows, _, _ = read(Source(str(path)))
    assert len(rows[0]["messages"][1]["content"]) == 300_000


def test_json_and_parquet_rows_that_are_no_utf8(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"text":"a"},{"text":"caf\xe9"},7,{"text":"b"}]')
    rows, _, quarantine = read(Source(str(path)))
    assert [r["messages"][0]["content"] for r in rows] == ["a", "b"]
    assert [(q["line"], q["reason"]) for q in quarantine] == [
        (2, "invalid_utf8"),
        (3, "not_an_object"),
    ]
    raw = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": raw, "n": [1, 2, 3]}), tmp_path / "x.parquet")
    rows, _, quarantine = read(Source(str(tmp_path / "x.parquet")))
    assert len(rows) == 2
    assert quarantine == [
        {"file": "x.parquet", "line": 2, "reason": "invalid_utf8", "excerpt": '{"n": 2}'}
    ]
