"""Which files a source stands for, what they are called, and what makes a whole file unreadable."""

import gzip
import json
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.ingest import files
from siftline.ingest.readers import Source, fingerprint, read_sources, source_files

QA = b'{"question":"q","answer":"a"}\n'


def names(*sources: Source) -> list[str]:
    found = [b.provenance["file"].to_pylist() for b in read_sources(sources)]
    return [name for part in found for name in part]


def fault(*sources: Source) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        list(read_sources(sources))
    return str(caught.value)


def test_folders_globs_and_files_name_files_relative_to_themselves(tmp_path):
    for name in ("a/x.jsonl", "b/x.jsonl", "b/c/y.json.gz", ".hidden/x.jsonl", "b/.x.jsonl.tmp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(QA) if name.endswith("gz") else QA)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / "a" / "x.jsonl")
    root = str(tmp_path)
    assert names(Source(root)) == ["a/link.jsonl", "a/x.jsonl", "b/c/y.json.gz", "b/x.jsonl"]
    assert names(Source(f"{root}/*/x.jsonl")) == ["a/x.jsonl", "b/x.jsonl"]
    assert names(Source(f"{root}/b/**/*.json*")) == ["c/y.json.gz", "x.jsonl"]
    assert names(Source(f"file://{root}/a/x.jsonl")) == ["x.jsonl"]
    assert source_files(Source(f"{root}/?/x.jsonl")) == [f"{root}/a/x.jsonl", f"{root}/b/x.jsonl"]


def test_files_of_one_name_grow_parents_whatever_the_order(tmp_path):
    for folder in ("one/a", "two/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jsonl").write_bytes(QA)
    (tmp_path / "y.jsonl").write_bytes(QA)
    sources = [Source(str(tmp_path / p)) for p in ("one/a/x.jsonl", "two/a", "y.jsonl")]
    assert names(*sources) == ["one/a/x.jsonl", "two/a/x.jsonl", "y.jsonl"]
    assert names(*sources[::-1]) == ["y.jsonl", "two/a/x.jsonl", "one/a/x.jsonl"]


def test_a_file_named_with_brackets_is_a_file(tmp_path):
    path = tmp_path / "x[1].jsonl"
    path.write_bytes(QA)
    assert names(Source(str(path))) == ["x[1].jsonl"]


def test_memory_urls(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.makedirs("/siftline_test", exist_ok=True)
    fs.pipe("/siftline_test/a.jsonl.zst", pa.compress(QA * 3, codec="zstd", asbytes=True))
    with fs.open("/siftline_test/b.parquet", "wb") as file:
        pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), file)
    assert names(Source("memory://siftline_test")) == ["a.jsonl.zst"] * 3 + ["b.parquet"]
    assert names(Source("memory://siftline_test/*.parquet")) == ["b.parquet"]


def test_the_fingerprint_knows_bytes_names_and_mapping_but_not_place_or_order(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(QA)
        (tmp_path / folder / "y.jsonl").write_bytes(QA * 2)

    def of(folder: str, order: int = 1, **mapping) -> str:
        both = [Source(str(tmp_path / folder / n), **mapping) for n in ("x.jsonl", "y.jsonl")]
        return fingerprint(both[::order])

    first = of("here")
    assert first == of("there") == of("here", -1)
    assert len(first) == 64
    assert of("here", source="s") != first
    (tmp_path / "there" / "y.jsonl").write_bytes(QA * 3)
    assert of("there") != first
    (tmp_path / "here" / "y.jsonl").rename(tmp_path / "here" / "z.jsonl")
    assert fingerprint([Source(str(tmp_path / "here"))]) != first


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.jsonl", b"", "empty"),
        ("x.jsonl", b" \n\n", "empty"),
        ("x.json", b"[]", "empty"),
        ("x.csv", b"question,answer\n", "empty"),
        ("x.json", b'[{"question":', "no valid JSON"),
        ("x.json", b'{"data":\n []}', "one array of objects"),
        ("x.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
        ("x.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("x.jsonl.gz", gzip.compress(QA * 1000)[:-20], "damaged"),
        ("x.jsonl.gz", QA, "damaged"),
        ("x.jsonl.zst", pa.compress(QA, codec="zstd", asbytes=True)[:-3], "damaged"),
        ("x.parquet", b"PAR1 half", "damaged"),
        ("x.arrow", b"nothing at all", "damaged"),
        ("x.txt", QA, "unknown ending"),
        ("x.parquet.gz", QA, "decompress"),
        ("x.jsonl", b'{"foo":1,"bar":2}\n', "no layout fits"),
        ("x.jsonl", b'{"prompt":"a","completion":"b","text":"c","messages":[]}\n', "all fit"),
        (
            "x.jsonl",
            b'{"question":"a","answer":"b","response":"c"}\n',
            "could each be the response",
        ),
        ("x.jsonl", b'{"chosen":"a","rejected":"b"}\n', "no record has every column"),
    ],
)
def test_faults_of_a_whole_file_name_it(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    text = fault(Source(str(path)))
    assert says in text
    assert str(path) in text
    assert "\n" not in text


def test_a_truncated_parquet_is_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["q"] * 100, "answer": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-50])
    assert "damaged, half-written" in fault(Source(str(path)))
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    assert "empty" in fault(Source(str(path)))


def test_layout_errors_name_the_columns_seen(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"foo":1}\n{"bar":2}\n')
    assert "columns seen: foo, bar" in fault(Source(str(path)))
    assert "no column 'gold'" in fault(Source(str(path), columns={"answer": "gold"}))
    assert "layout alpaca needs instruction, output" in fault(Source(str(path), layout="alpaca"))
    path.write_bytes(QA)
    assert "no independent reference" in fault(
        Source(str(path), columns={"response": "answer", "answer": "answer"})
    )
    both = Source(
        str(path), columns={"response": "question", "answer": "answer", "question": "question"}
    )
    assert names(both) == ["x.jsonl"]
    pattern = Source(str(path), columns=both.columns, answer_pattern="(x)")
    assert "not both" in fault(pattern)


def test_paths_that_lead_nowhere(tmp_path):
    assert "no such file" in fault(Source(str(tmp_path / "none.jsonl")))
    assert "no file matches" in fault(Source(str(tmp_path / "*.jsonl")))
    assert "no readable file" in fault(Source(str(tmp_path)))
    assert "no file system" in fault(Source("nosuch://x/y.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(QA)
    twice = [Source(str(tmp_path)), Source(str(tmp_path / "x.jsonl"))]
    assert "same mapping" in fault(*twice)
    other = Source(str(tmp_path / "x.jsonl"), source="other")
    assert names(twice[0], other) == ["x.jsonl"] * 2
    assert "at least one source" in fault()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": ""}, "needs a path"),
        ({"format": "xml"}, "format 'xml' is unknown"),
        ({"layout": "chat"}, "layout 'chat' is unknown"),
        ({"columns": {"qestion": "q"}}, "did you mean 'question'"),
        ({"columns": {"question": "q"}, "layout": "messages"}, "does not read"),
        ({"answer_pattern": "("}, "answer_pattern"),
        ({"answer_pattern": "a(b)(c)"}, "2 groups"),
        ({"path": "datasets:x", "format": "csv"}, "format datasets"),
    ],
)
def test_sources_that_contradict_themselves(settings, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Source(**{"path": "x.jsonl", **settings})
    assert says in str(caught.value)


def test_mapped_fields_decide_between_layouts(tmp_path):
    path = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "m"}, {"role": "assistant", "content": "n"}]
    path.write_text(json.dumps({"problem": "p", "solution": "s", "messages": turns}) + "\n")
    rows = next(read_sources([Source(str(path))])).rows
    assert rows["messages"][0][0]["content"].as_py() == "m"
    mapped = next(read_sources([Source(str(path), columns={"question": "problem"})])).rows
    assert [m["content"] for m in mapped["messages"][0].as_py()] == ["p", "s"]


def test_datasets_by_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "toys" / "data"
    folder.mkdir(parents=True)
    table = pa.table({"question": ["q", "r", "q"], "answer": ["a", "", "c"]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    source = Source(f"datasets:{tmp_path}/toys")
    batch = next(read_sources([source]))
    assert batch.rows["source"].to_pylist() == ["toys"] * 2
    assert batch.provenance["file"].to_pylist() == ["toys/train"] * 2
    assert batch.provenance["line"].to_pylist() == [1, 3]
    assert [(q["line"], q["reason"]) for q in batch.quarantine.to_pylist()] == [
        (2, "empty_response")
    ]
    assert source_files(source) == [source.path]
    first = fingerprint([source])
    assert first == fingerprint([source])
    pq.write_table(table.slice(0, 2), folder / "train-00000-of-00001.parquet")
    assert fingerprint([source]) != first
    wrong = Source(source.path, split="nosuch")
    assert "could not load" in fault(wrong)


def test_without_the_datasets_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"siftline\[datasets\]"):
        files.load_dataset(Source("datasets:x"))
