"""Every layout through every format; answers, mappings, provenance, batches."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.ingest.readers import Source, read_sources
from siftline.rows import schema

CHAT = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Add\n2+2"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "And\r\n3+3? "},
    {"role": "assistant", "content": "6"},
]
PARTS = {"role": "user", "content": [{"type": "text", "text": t} for t in ("Add", "2+2")]}
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+2?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"b": 2, "a": 2}}'},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "4"},
]
U, A = "user", "assistant"
CALL = '{"arguments":{"a":2,"b":2},"name":"add"}'

# layout -> (record, the conversations it must become as (role, content, reasoning, tool_calls))
LAYOUTS = {
    "messages": (
        {"messages": CHAT},
        [
            [
                ("system", "Be brief.", None, None),
                (U, "Add\n2+2", None, None),
                (A, "4", "two and two", None),
                (U, "And\r\n3+3? ", None, None),
                (A, "6", None, None),
            ]
        ],
    ),
    "sharegpt": (
        {"conversations": SHAREGPT},
        [
            [
                ("system", "Be brief.", None, None),
                (U, "2+2?", None, None),
                (A, "", None, CALL),
                ("tool", "4", None, None),
                (A, "4", None, None),
            ]
        ],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."},
        [
            [
                ("system", "Be brief.", None, None),
                (U, "Add.\n2 and 2", None, None),
                (A, "4", None, None),
            ]
        ],
    ),
    "prompt_completion": (
        {"prompt": "2+2?", "completion": " 4"},
        [[(U, "2+2?", None, None), (A, " 4", None, None)]],
    ),
    "question_answer": (
        {"question": "2+2?", "answer": "four\n#### 4"},
        [[(U, "2+2?", None, None), (A, "four\n#### 4", None, None)]],
    ),
    "text": ({"text": "Once upon a time"}, [[(A, "Once upon a time", None, None)]]),
    "pairs": (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        [
            [(U, "2+2?", None, None), (A, "4", None, None)],
            [(U, "2+2?", None, None), (A, "5", None, None)],
        ],
    ),
}
MESSAGE_LISTS = {
    "prompt_completion": {"prompt": [PARTS], "completion": [CHAT[2]]},
    "pairs": {"prompt": [PARTS], "chosen": [CHAT[2]], "rejected": [CHAT[4]]},
}
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "csv.gz", "parquet", "arrow", "feather")


def write(path: Path, records: list[dict]) -> Path:
    """Writes records with the libraries people write such files with."""
    kind = path.name.partition(".")[2]
    if kind.startswith("jsonl"):
        data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    elif kind == "json":
        data = json.dumps(records).encode()
    elif kind.startswith("csv"):
        plain = path.with_suffix(".tmp")
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            for r in records:
                flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()}
                writer.writerow(flat)
        data = plain.read_bytes()
        plain.unlink()
    else:
        table = pa.Table.from_pylist(records)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            opened = pa.ipc.new_file if kind == "feather" else pa.ipc.new_stream
            with opened(str(path), table.schema) as writer:
                writer.write_table(table)
        return path
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


def read(*sources: Source, **options) -> tuple[list[dict], list[dict], list[dict]]:
    batches = list(read_sources(sources, **options))
    for batch in batches:
        assert batch.rows.schema == schema.ROW
        assert batch.provenance.schema == schema.PROVENANCE
        assert batch.quarantine.schema == schema.QUARANTINE
        assert batch.rows["id"].to_pylist() == batch.provenance["id"].to_pylist()
    tables = (
        [b.rows for b in batches],
        [b.provenance for b in batches],
        [b.quarantine for b in batches],
    )
    return tuple([row for table in part for row in table.to_pylist()] for part in tables)


def expected_id(turns, *, source, answer=None, tools=None) -> str:
    keys = ("role", "content", "reasoning", "tool_calls")
    messages = [dict(zip(keys, turn, strict=True)) for turn in turns]
    return schema.row_id(messages, tools=tools, answer=answer, source=source)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_alike_from_every_format(tmp_path, layout, ending):
    record, conversations = LAYOUTS[layout]
    path = write(tmp_path / f"toy.{ending}", [record, record])
    rows, provenance, quarantine = read(Source(str(path)))
    assert quarantine == []
    assert [r["id"] for r in rows] == [expected_id(c, source="toy") for c in conversations] * 2
    got = [[tuple(m.values())[:4] for m in r["messages"]] for r in rows]
    assert got == conversations * 2
    assert {m[name] for r in rows for m in r["messages"] for name in schema.EXTRAS} == {None}
    assert {r["copies"] for r in rows} == {1}
    n = len(conversations)
    assert [p["line"] for p in provenance] == [1] * n + [2] * n
    assert {p["file"] for p in provenance} == {path.name}
    pairs = ['{"pair":"chosen"}', '{"pair":"rejected"}']
    assert [p["leftover"] for p in provenance] == (pairs * 2 if layout == "pairs" else [None] * 2)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("layout", MESSAGE_LISTS)
def test_message_lists_in_prompts_completions_and_pairs(tmp_path, layout, ending):
    path = write(tmp_path / f"toy.{ending}", [MESSAGE_LISTS[layout]])
    rows, _, quarantine = read(Source(str(path)))
    assert quarantine == []
    asked = (U, "Add\n2+2", None, None)
    want = [[asked, (A, "4", "two and two", None)], [asked, (A, "6", None, None)]]
    want = want[: len(rows)]
    assert len(rows) == (2 if layout == "pairs" else 1)
    assert [r["id"] for r in rows] == [expected_id(c, source="toy") for c in want]


def test_pairs_of_whole_conversations_do_not_repeat_the_prompt(tmp_path):
    record = {
        "prompt": "2+2?",
        "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
        "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}],
    }
    rows, _, _ = read(Source(str(write(tmp_path / "p.jsonl", [record]))))
    assert [[m["content"] for m in r["messages"]] for r in rows] == [["2+2?", "4"], ["2+2?", "5"]]
    assert len({r["prompt_id"] for r in rows}) == 1


def test_pair_halves_stand_or_fall_apart(tmp_path):
    record = {"prompt": "2+2?", "chosen": "4", "rejected": " "}
    rows, provenance, quarantine = read(Source(str(write(tmp_path / "p.jsonl", [record]))))
    assert [r["messages"][-1]["content"] for r in rows] == ["4"]
    assert provenance[0]["leftover"] == '{"pair":"chosen"}'
    assert [(q["line"], q["reason"]) for q in quarantine] == [(1, "empty_response")]


def test_tools_and_calls_are_the_same_json_however_they_are_written(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}
    tools = [{"type": "function", "function": {"name": "add", "description": None}}]
    turns = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    as_json = {"messages": json.dumps(turns, indent=2), "tools": json.dumps(tools)}
    files = [
        write(tmp_path / "a.jsonl", [{"messages": turns, "tools": tools}]),
        write(tmp_path / "b.parquet", [{"messages": turns, "tools": tools}]),
        write(tmp_path / "c.csv", [as_json]),
        write(tmp_path / "d.json", [as_json]),
    ]
    rows, _, quarantine = read(*[Source(str(f), source="s") for f in files])
    assert quarantine == []
    assert len({r["id"] for r in rows}) == 1
    assert rows[0]["tools"] == '[{"function":{"name":"add"},"type":"function"}]'
    calls = rows[0]["messages"][1]["tool_calls"]
    assert calls == '[{"function":{"arguments":{"a":2,"b":1},"name":"add"},"type":"function"}]'


def test_mapped_answer_is_independent_and_wins_its_column(tmp_path):
    record = {"q": "2+2?", "r": "it is 4", "gold": 4, "origin": "web", "level": 3, "note": None}
    source = Source(
        str(write(tmp_path / "m.jsonl", [record, {**record, "gold": None, "origin": ""}])),
        columns={"question": "q", "response": "r", "answer": "gold", "source": "origin"},
    )
    rows, provenance, _ = read(source)
    assert [(r["answer"], r["answer_from"], r["source"]) for r in rows] == [
        ("4", "independent", "web"),
        (None, None, "m"),
    ]
    assert rows[0]["id"] == expected_id(
        [(U, "2+2?", None, None), (A, "it is 4", None, None)], source="web", answer="4"
    )
    assert provenance[0]["leftover"] == '{"level":3}'


def test_answer_pattern_takes_the_last_match_of_the_response(tmp_path):
    records = [
        {"question": "q", "answer": "#### 1\nno\n#### 2 "},
        {"question": "q", "answer": "none"},
    ]
    path = str(write(tmp_path / "g.jsonl", records))
    rows, _, _ = read(Source(path, answer_pattern=r"#### (.+)"))
    assert [(r["answer"], r["answer_from"]) for r in rows] == [("2", "response"), (None, None)]


def test_constant_source_and_instruction(tmp_path):
    path = str(write(tmp_path / "t.csv", [{"input_col": "a\nb", "output_col": "c", "source": "x"}]))
    columns = {"question": "input_col", "answer": "output_col"}
    source = Source(path, columns=columns, source="ni", instruction="Copy it.")
    rows, provenance, _ = read(source)
    want = [(U, "Copy it.\na\nb", None, None), (A, "c", None, None)]
    assert rows[0]["id"] == expected_id(want, source="ni")
    assert rows[0]["answer"] is None
    assert provenance[0]["leftover"] == '{"source":"x"}'


def test_instruction_goes_before_the_first_user_message(tmp_path):
    path = str(write(tmp_path / "t.jsonl", [{"messages": CHAT}]))
    rows, _, _ = read(Source(path, instruction="Reply in French."))
    contents = [m["content"] for m in rows[0]["messages"]]
    assert contents[:2] == ["Be brief.", "Reply in French.\nAdd\n2+2"]
    assert contents[3] == "And\r\n3+3? "


def test_leftovers_are_json_with_sorted_keys_and_message_extras(tmp_path):
    turns = [{"role": "user", "content": "x", "name": "Ann", "mood": "calm"}]
    turns.append({"role": "assistant", "content": "y"})
    table = pa.table(
        {
            "z": pa.array([1.5]),
            "messages": pa.array([turns]),
            "day": pa.array(["2020-01-02"]).cast(pa.timestamp("s")),
            "none": pa.array([float("nan")]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    rows, provenance, _ = read(Source(str(tmp_path / "x.parquet")))
    want = '{"day":"2020-01-02 00:00:00","messages.0":{"mood":"calm"},"z":1.5}'
    assert rows[0]["messages"][0]["name"] == "Ann"
    assert provenance[0]["leftover"] == want


def test_alpaca_files_with_a_rendered_text_column_are_alpaca(tmp_path):
    record = {"instruction": "Add.", "input": "", "output": "4", "text": "### Instruction: Add."}
    rows, provenance, _ = read(Source(str(write(tmp_path / "a.jsonl", [record]))))
    assert [m["content"] for m in rows[0]["messages"]] == ["Add.", "4"]
    assert provenance[0]["leftover"] == '{"text":"### Instruction: Add."}'


def test_batches_are_bounded_and_do_not_change_the_rows(tmp_path):
    records = [{"question": f"q{i}", "answer": "a" if i % 3 else ""} for i in range(50)]
    paths = [write(tmp_path / f"{n}.jsonl", records) for n in "ab"]
    sources = [Source(str(p)) for p in paths]
    sizes = [b.rows.num_rows + b.quarantine.num_rows for b in read_sources(sources, batch_rows=7)]
    assert sizes == [7] * 14 + [2]
    assert read(*sources, batch_rows=7) == read(*sources)
    assert read(*sources, batch_rows=7) == read(*sources, batch_rows=1)


def test_gsm8k():
    folder = os.environ.get("SIFTLINE_TEST_DATA")
    if not folder:
        pytest.skip("SIFTLINE_TEST_DATA names no folder with gsm8k/train.jsonl")
    path = Path(folder) / "gsm8k" / "train.jsonl"
    rows, provenance, quarantine = read(Source(str(path), answer_pattern=r"#### (.+)"))
    assert (len(rows), len(quarantine)) == (7473, 0)
    assert [p["line"] for p in provenance] == list(range(1, 7474))
    wanted = [
        json.loads(s)["answer"].split("####")[-1].strip() for s in path.open(encoding="utf-8")
    ]
    assert [r["answer"] for r in rows] == wanted
    assert {r["answer_from"] for r in rows} == {"response"}
