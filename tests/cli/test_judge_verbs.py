"""`siftline decontaminate`, `filter` and `verify` on files, streams and each other's outputs."""

import io
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from siftline.cli import main

SUMS = [
    {
        "prompt": f"What is {n} plus {n}?",
        "completion": f"The answer is {said}.",
        "answer": str(2 * n),
    }
    for n, said in ((1, 2), (2, 5), (3, 6), (4, 8))
]


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(*arguments, stdin=None)`: what the command wrote to stdout, or its line of error."""

    def act(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        said = capsys.readouterr()
        if ended.value.code:
            (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            return line
        return said.out

    return act


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(folder, part):
    return pl.read_parquet(Path(folder) / part / "*.parquet")


def test_a_stream_goes_through_as_it_was(call):
    odd = [{**row, "more": {"a": [k, None, "ü"]}} for k, row in enumerate(SUMS)]
    out = call("verify", "-", stdin=lines(odd))
    assert [json.loads(line) for line in out.splitlines()] == [odd[0], *odd[2:]]
    assert call("verify", "-", "--out", "-", stdin=out) == out


def test_a_pipe_of_processes_gives_rows_on_stdout_and_counts_on_stderr(tmp_path):
    command = [sys.executable, "-m", "siftline.cli", "verify", "-", "--json"]
    done = subprocess.run(
        command, input=lines(SUMS), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [SUMS[0], *SUMS[2:]]
    (counts,) = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert (counts["rows"], counts["kept"], counts["reasons"]) == (4, 3, {"wrong_answer": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_every_format_gives_the_same_rows(call, tmp_path, form):
    path = tmp_path / f"sums.{form}"
    frame = pl.DataFrame(SUMS)
    if form == "jsonl.gz":
        import gzip

        path.write_bytes(gzip.compress(lines(SUMS).encode()))
    elif form == "json":
        path.write_text(json.dumps(SUMS))
    elif form == "arrow":
        frame.write_ipc(path)
    else:
        getattr(frame, {"jsonl": "write_ndjson"}.get(form, f"write_{form}"))(path)
    said = json.loads(call("verify", path, "--out", tmp_path / "out", "--json"))
    assert (said["rows"], said["kept"], said["removed"]) == (4, 3, 1)
    assert read(tmp_path / "out", "data")["prompt"].to_list() == [
        SUMS[k]["prompt"] for k in (0, 2, 3)
    ]
    (gone,) = read(tmp_path / "out", "removed").to_dicts()
    assert gone["prompt"] == SUMS[1]["prompt"]
    assert (gone["sift_reason"], gone["sift_value"], gone["sift_threshold"]) == (
        "wrong_answer", 0.0, 1.0
    )  # fmt: skip
    assert gone["sift_matched_id"] is gone["sift_matched_row"] is gone["sift_similarity"] is None
    assert not (tmp_path / "out" / ".scratch").exists()


def test_one_verb_reads_what_another_wrote(call, tmp_path):
    """dedup, decontaminate, filter, verify, select: nothing is lost on the way but what is told."""
    rows = [*SUMS, SUMS[0], {**SUMS[2], "completion": "It is not known. " * 30}]
    first, exam = tmp_path / "rows.jsonl", tmp_path / "exam.jsonl"
    first.write_text(lines([*rows, {"prompt": "alone"}]))
    exam.write_text(lines([{"question": "what is 4 PLUS 4", "answer": "8"}]))
    told = json.loads(call("dedup", first, "--out", tmp_path / "a", "--json"))
    assert (told["rows"], told["kept"], told["removed"], told["quarantined"]) == (7, 5, 1, 1)
    steps = [
        ("decontaminate", "--against", exam),
        ("filter", "--set", "languages.en.min_words=5"),
        ("verify",),
    ]
    here, left = tmp_path / "a", 5
    for verb, *arguments in steps:
        there = tmp_path / verb
        told = json.loads(call(verb, here / "data", *arguments, "--out", there, "--json"))
        assert (told["rows"], told["removed"], told["quarantined"]) == (left, 1, 0), verb
        here, left = there, left - 1
    assert sorted(read(here, "data")["prompt"]) == sorted(SUMS[k]["prompt"] for k in (0, 2))
    assert read(tmp_path / "decontaminate", "removed")["sift_matched_row"].to_list() == [
        f"{exam}:1"
    ]
    call("select", "random", here / "data", "--budget", "1", "--out", tmp_path / "chosen")
    assert (tmp_path / "chosen" / "data").is_dir()


def test_what_can_not_be_read_is_set_apart_by_row(call, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(SUMS[:1]) + "{broken\n\n" + lines([{**SUMS[1], "prompt": 7}, SUMS[2]]))
    said = json.loads(call("verify", path, "--out", tmp_path / "out", "--json"))
    assert said["unreadable"]["invalid_json"] == 1
    assert said["rows"] == said["kept"] + said["removed"] + said["quarantined"]
    lost = read(tmp_path / "out", "quarantine")
    assert lost["sift_row"][0] == f"{path}:2"
    assert "{broken" in lost["excerpt"][0]


def test_values_of_several_kinds_are_written_as_they_were(call, tmp_path):
    rows = [{**row, "answer": int(row["answer"]) if k % 2 else row["answer"]} for k, row in
            enumerate(SUMS)]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(lines(rows))
    for name, count in (("verify", 3), ("dedup", 4)):
        out = tmp_path / name
        said = json.loads(call(name, path, "--out", out, "--json"))
        assert said["kept"] == count
        kept = [json.loads(line) for line in (out / "data" / "part-00000.jsonl").open()]
        assert [{k: row[k] for k in SUMS[0]} for row in kept] == [
            row for k, row in enumerate(rows) if name == "dedup" or k != 1
        ]
    (gone,) = [json.loads(x) for x in (tmp_path / "verify" / "removed" / "part-00000.jsonl").open()]
    assert (gone["answer"], gone["sift_reason"]) == (4, "wrong_answer")
    again = json.loads(
        call("verify", tmp_path / "dedup" / "data", "--out", tmp_path / "c", "--json")
    )
    assert (again["rows"], again["kept"]) == (4, 3)

    import siftline as sl

    result = sl.verify(path)
    assert result.kept == [rows[k] for k in (0, 2, 3)]
    assert result.removed[0]["sift_reason"] == "wrong_answer"
    for k, form in enumerate((path, rows)):
        saved = sl.verify(form).save(tmp_path / f"saved{k}")
        assert (saved / "data" / "part-00000.jsonl").read_text() == lines(result.kept)


def test_rows_that_a_verifier_fails_on_are_neither_right_nor_wrong(call, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "from siftline.scoring.verifiers import Verdict\n"
        "def check(response, answer):\n"
        "    if '5' in response:\n"
        "        raise RuntimeError('no fives')\n"
        "    return Verdict(True, answer, 'match')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text(lines(SUMS))
    out = tmp_path / "out"
    said = json.loads(call("verify", path, "--verifier", "picky:check", "--out", out, "--json"))
    assert (said["kept"], said["failed"]) == (3, 1)
    assert read(out, "failed")["sift_reason"].to_list() == ["verifier_error"]


def test_faults_are_one_line_with_the_remedy(call, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(SUMS))
    out = ("--out", tmp_path / "out")
    assert "--out is missing" in call("verify", path)
    assert "did you mean 'near'" in call(
        "decontaminate", path, "--against", path, "--set", "nera=1", *out
    )
    assert "unknown verifier 'maths'" in call("verify", path, "--verifier", "maths", *out)
    assert "no such file" in call("filter", tmp_path / "b.jsonl", *out)
    assert "name - once" in call("verify", "-", "-", *out, stdin="")
    assert "no row" in call("verify", "-", stdin="")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in call("verify", path, *out)
