"""`siftline score`: every input row ends in one of two tables, with the numbers of the engine."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from siftline.cli import main
from siftline.scoring.engines.base import ModelSpec, open_engine
from siftline.scoring.spans import response_span, start_token

SCORES = [
    "id",
    "file",
    "row",
    "n_response_tokens",
    "logprob_sum",
    "logprob_mean",
    "logprob_mean_unconditional",
    "perplexity",
    "ifd_loss_ratio",
    "ifd_perplexity_ratio",
]


def pair(i):
    return {"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}." + "!" * (i % 7)}


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def call(tiny_model, capsys):
    """`call(out, *arguments)` runs the verb here: exit status, stdout, stderr."""

    def run(out, *arguments, model=tiny_model, engine="transformers"):
        fixed = ["--model", str(model), "--engine", engine, "--out", str(out), "--device", "cpu"]
        with pytest.raises(SystemExit) as ended:
            main(["score", *map(str, arguments), *fixed])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def done(result):
    code, out, err = result
    assert code == 0, err
    (line,) = out.splitlines()
    return json.loads(line)


def refused(result):
    code, out, err = result
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.rstrip("\n").endswith(line)
    return line


def tables(out):
    return pl.read_parquet(out / "scores.parquet"), pl.read_parquet(out / "failed.parquet")


# ---- the numbers -----------------------------------------------------------------------------


def test_every_row_has_the_log_probabilities_of_its_response(call, tmp_path, tiny_model):
    rows = [pair(i) for i in range(12)]
    result = done(call(tmp_path / "out", write(tmp_path / "a.jsonl", rows), "--json"))
    scores, failed = tables(tmp_path / "out")
    assert scores.columns == SCORES
    assert failed.height == 0
    assert scores["row"].to_list() == list(range(1, 13))
    assert set(scores["file"]) == {"a.jsonl"}
    engine = open_engine(ModelSpec(str(tiny_model), device="cpu"))
    for line, row in zip(scores.to_dicts(), rows, strict=True):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        tokens, (start, end) = response_span(engine.tokenizer, messages)
        (given,) = engine.score([tokens], [(start, end)])
        alone = [start_token(engine.tokenizer), *tokens[start:end]]
        (free,) = engine.score([alone], [(1, len(alone))])
        assert line["n_response_tokens"] == end - start == len(given)
        assert line["logprob_sum"] == pytest.approx(float(given.sum()), abs=1e-3)
        assert line["logprob_mean"] == pytest.approx(float(given.mean()), abs=1e-4)
        assert line["logprob_mean_unconditional"] == pytest.approx(float(free.mean()), abs=1e-4)
        assert line["perplexity"] == pytest.approx(np.exp(-float(given.mean())), rel=1e-3)
        assert line["ifd_loss_ratio"] == pytest.approx(given.mean() / free.mean(), rel=1e-3)
        ratio = np.exp(float(free.mean()) - float(given.mean()))
        assert line["ifd_perplexity_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert result["scored"] == result["rows"] == 12
    assert result["computed"] == 24
    assert result["tokens"] > scores["n_response_tokens"].sum()
    assert result["scores"] == str(tmp_path / "out" / "scores.parquet")
    assert result["tokens_per_second"] > 0


def test_details_and_turns_add_columns_and_tokens(call, tmp_path):
    chat = [{"messages": [
        {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"},
    ]}]  # fmt: skip
    path = write(tmp_path / "a.jsonl", chat)
    more = ["--detail", "entropy", "--detail", "top1", "--detail", "pooled"]
    done(call(tmp_path / "last", path, "--json", *more))
    done(call(tmp_path / "all", path, "--json", "--turns", "all"))
    last, _ = tables(tmp_path / "last")
    every, _ = tables(tmp_path / "all")
    assert last.columns == [*SCORES, "entropy_mean", "top1_rate", "pooled"]
    assert every.columns == SCORES
    assert every["n_response_tokens"][0] > last["n_response_tokens"][0]
    assert 0 < last["entropy_mean"][0] < np.log(300)
    assert np.linalg.norm(last["pooled"].to_list()[0]) == pytest.approx(1, abs=2e-3)
    _, out, _ = call(tmp_path / "last", path, *more)
    assert re.search(r"^entropy_mean +[\d.]+", out, re.M)
    assert re.search(r"^rows +1$", out, re.M)


def test_a_template_of_ones_own_is_the_one_used(call, tmp_path, tiny_model):
    row = pair(3)
    path, template = write(tmp_path / "a.jsonl", [row]), tmp_path / "t.jinja"
    text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template.write_text(text + "{% if add_generation_prompt %}[assistant]{% endif %}")
    done(call(tmp_path / "out", path, "--json", "--template", template))
    engine = open_engine(ModelSpec(str(tiny_model), device="cpu"))
    written = engine.tokenizer(f"[user]{row['prompt']}[assistant]{row['completion']}")
    tokens = [*written["input_ids"], engine.tokenizer.eos_token_id]
    length = len(row["completion"].encode()) + 1
    (given,) = engine.score([tokens], [(len(tokens) - length, len(tokens))])
    line = tables(tmp_path / "out")[0].row(0, named=True)
    assert line["n_response_tokens"] == length
    assert line["logprob_sum"] == pytest.approx(float(given.sum()), abs=1e-3)


# ---- every row is somewhere ------------------------------------------------------------------


def test_every_row_of_every_format_is_scored_or_has_a_reason(call, tmp_path):
    rows = [pair(i) for i in range(5)]
    bad = ["{broken", pair(0) | {"completion": ""}, {"other": 1}, pair(9) | {"prompt": "x" * 400}]
    inputs = tmp_path / "in"
    inputs.mkdir()
    write(inputs / "a.jsonl", [*rows, *bad, rows[0]])  # the first row once more
    with gzip.open(inputs / "b.jsonl.gz", "wt") as handle:
        handle.write(json.dumps(rows[1]) + "\n")
    pl.DataFrame(rows).write_parquet(inputs / "c.parquet")
    pl.DataFrame(rows).write_csv(inputs / "d.csv")
    (inputs / "e.json").write_text(json.dumps(rows))
    result = done(call(tmp_path / "out", inputs, "--max-length", "200", "--json"))
    scores, failed = tables(tmp_path / "out")
    expected = {("a.jsonl", i) for i in (1, 2, 3, 4, 5, 10)} | {("b.jsonl.gz", 1)}
    expected |= {(f, i) for f in ("c.parquet", "d.csv", "e.json") for i in range(1, 6)}
    assert set(scores.select("file", "row").iter_rows()) == expected
    assert scores.height == len(expected)
    assert scores.equals(scores.sort("file", "row"))
    assert failed.select("file", "row", "reason").rows() == [
        ("a.jsonl", 6, "invalid_json"),
        ("a.jsonl", 7, "empty_response"),
        ("a.jsonl", 8, "missing_column"),
        ("a.jsonl", 9, "too_long"),
    ]
    assert failed["id"].is_null().to_list() == [True, True, True, False]
    assert (result["rows"], result["scored"], result["failed_rows"]) == (26, 22, 4)
    assert result["computed"] == 10, "five conversations, with and without their prompt"
    twice = scores.filter(pl.col("file") == "a.jsonl", pl.col("row").is_in([1, 10]))
    assert twice["id"].n_unique() == 1
    assert twice["logprob_sum"].n_unique() == 1


def test_columns_are_mapped_by_field(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"ask": "What?", "reply": "That."}])
    line = refused(call(tmp_path / "out", path))
    assert "ask, reply" in line
    fields = ["--field", "question=ask", "--field", "response=reply"]
    assert done(call(tmp_path / "out", path, "--json", *fields))["scored"] == 1


def test_too_many_failed_rows_end_in_an_error_with_the_tables_written(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1), "{", pair(2) | {"prompt": "x" * 400}])
    limits = ["--max-length", "200", "--json"]
    assert done(call(tmp_path / "out", path, *limits))["failed_rows"] == 2
    assert done(call(tmp_path / "out", path, *limits, "--max-failed", "0.7"))["failed_rows"] == 2
    code, out, err = call(tmp_path / "out", path, *limits, "--max-failed", "0.5")
    assert code == 1
    assert json.loads(out)["failed_rows"] == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: 2 of 3 rows have no score (invalid_json 1, too_long 1)")
    assert tables(tmp_path / "out")[1].height == 2


# ---- twice, killed, at once ------------------------------------------------------------------


def test_a_second_run_computes_nothing_and_writes_the_same_bytes(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [*(pair(i) for i in range(20)), "{"])
    first = done(call(tmp_path / "out", path, "--json"))
    before = [(tmp_path / "out" / n).read_bytes() for n in ("scores.parquet", "failed.parquet")]
    second = done(call(tmp_path / "out", path, "--json"))
    assert (first["computed"], second["computed"], second["found"]) == (40, 0, 40)
    assert second["tokens"] == 0
    after = [(tmp_path / "out" / n).read_bytes() for n in ("scores.parquet", "failed.parquet")]
    assert after == before
    names = {p.name for p in (tmp_path / "out").iterdir()}
    listed = "siftline-files.json"
    assert names == {"scores.parquet", "failed.parquet", "store", ".siftline-score", listed}
    # Rows that are new are the only ones asked, rows that are gone are not in the tables.
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(10, 25)])
    third = done(call(tmp_path / "out", path, "--json"))
    assert (third["computed"], third["scored"]) == (10, 15)


def test_the_order_of_files_changes_no_byte(call, tmp_path):
    one = write(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    two = write(tmp_path / "b.jsonl", [pair(i) for i in range(20, 29)])
    done(call(tmp_path / "x", one, two, "--json"))
    done(call(tmp_path / "y", two, one, "--json"))
    read = [(tmp_path / n / "scores.parquet").read_bytes() for n in ("x", "y")]
    assert read[0] == read[1]


KILLED = """
import os, sys, time
from pathlib import Path
import siftline.cli.score_tables
from siftline.cli import main
from siftline.scoring.engines.transformers_engine import TransformersEngine
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Nothing is run before the forks, because pools of threads don't survive one; imports are shared.
model, path, out, *kills = sys.argv[1:]
real = TransformersEngine.inspect
log = os.open(out + ".log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def counted(self, *asked):
    os.write(log, b".")
    time.sleep(0.01)
    return real(self, *asked)

TransformersEngine.inspect = counted

def score():
    main(["score", path, "--model", model, "--out", out, "--device", "cpu",
          "--batch-tokens", "300", "--json"])

for wanted in map(int, kills):
    child = os.fork()
    if not child:
        score()
        os._exit(0)
    while os.path.getsize(out + ".log") < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not Path(out, "scores.parquet").exists(), "the kill came too late to test anything"
score()
"""
"""Scores again and again, killed after so many batches, then once to the end."""


def test_a_killed_run_is_taken_up_and_ends_in_the_same_bytes(call, tiny_model, tmp_path):
    path, out = write(tmp_path / "a.jsonl", [pair(i) for i in range(150)]), tmp_path / "out"
    dice, kills = random.Random(4), []
    for _ in range(2):
        kills.append((kills[-1] if kills else 0) + dice.randint(5, 25))
    said = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (tiny_model, path, out, *kills))],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    last = json.loads(said.stdout.splitlines()[-1])
    assert last["found"] > 0
    assert last["computed"] + last["found"] == 300
    done(call(tmp_path / "calm", path, "--batch-tokens", "300", "--json"))
    for name in ("scores.parquet", "failed.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert not (out / ".rows").exists()


def test_two_runs_into_one_folder_do_not_mix(call, tmp_path):
    import fcntl

    path = write(tmp_path / "a.jsonl", [pair(1)])
    done(call(tmp_path / "out", path, "--json"))
    with (tmp_path / "out" / ".siftline-score").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "being written by another run" in refused(call(tmp_path / "out", path))


# ---- refusals --------------------------------------------------------------------------------


def test_no_readable_row(call, tmp_path):
    path = write(tmp_path / "a.jsonl", ["{", "["])
    assert "no readable row among 2" in refused(call(tmp_path / "out", path))


def test_missing_file_and_model(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1)])
    assert "no such file" in refused(call(tmp_path / "out", tmp_path / "nowhere.jsonl"))
    line = refused(call(tmp_path / "out", path, model=tmp_path / "nomodel"))
    assert "no model directory" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.parquet").write_text("mine")
    assert "name an empty folder" in refused(call(out, path))
    assert (out / "scores.parquet").read_text() == "mine"
    assert len(list(out.iterdir())) == 1
    done(call(tmp_path / "new", path, "--json"))
    (tmp_path / "new" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(call(tmp_path / "new", path))
    assert "is a file" in refused(call(path, path))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--field", "prompt"], "give it as FIELD=COLUMN"),
        (["--field", "promt=a"], "did you mean 'prompt'"),
        (["--url", "http://127.0.0.1:1/v1"], "--url is for --engine server"),
        (["--max-length", "1"], "max_length is 1"),
    ],
)
def test_options_that_make_no_sense(call, tmp_path, more, said):
    path = write(tmp_path / "a.jsonl", [pair(1)])
    assert said in refused(call(tmp_path / "out", path, *more))


def test_a_server_needs_its_address(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1)])
    assert "needs --url" in refused(call(tmp_path / "out", path, engine="server"))


def test_an_engine_that_only_embeds_is_no_choice(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(1)])
    code, out, err = call(tmp_path / "out", path, engine="sentence-transformers")
    assert (code, out) == (2, "")
    assert "'transformers', 'vllm', 'server'" in err


# ---- progress --------------------------------------------------------------------------------


def test_elsewhere_there_are_lines_and_no_bar(call, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    _, _, err = call(tmp_path / "out", path, "--json")
    assert "\x1b" not in err
    assert re.search(r"^read 5 rows in 0:\d\d$", err, re.M)
    assert re.search(r"^likelihood 10 forward rows in 0:\d\d, [\d,]+ tokens, ", err, re.M)


def test_the_store_of_a_folder_is_listed_like_a_roots(call, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    done(call(tmp_path / "out", path, "--json"))
    with pytest.raises(SystemExit):
        main(["cache", "ls", "--json", "--root", str(tmp_path / "out")])
    (line,) = json.loads(capsys.readouterr().out)["namespaces"]
    assert (line["scorer"], line["records"], line["journals"]) == ("likelihood", 10, 0)
    assert Path(tmp_path / "out" / "store" / line["name"]).is_dir()
