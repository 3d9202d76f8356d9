"""`siftline train` and `siftline eval` through the command line."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.cli import main
from siftline.rows import schema

FAST = ("--set", "epochs=2", "--set", "batch_rows=10", "--set", "max_length=96")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, no picture: models this small spend their time elsewhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)
    yield
    torch.set_num_threads(before)


def rows(n=20, start=0):
    turns = [
        [schema.message("user", f"{i}+{i}?"), schema.message("assistant", f"It is {2 * i}")]
        for i in range(start, start + n)
    ]
    return pa.Table.from_pylist([schema.make_row(t) for t in turns], schema=schema.ROW)


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture
def version(tmp_path, make_version):
    """A folder of versions as publishing leaves it."""
    return make_version(tmp_path / "curated" / "mine", [rows(12), rows(8, 12)])


def test_a_version_a_link_its_data_and_its_files_are_one_run(call, tiny_model, tmp_path, version):
    told = []
    places = [[version], [version.parent], [version / "data"], sorted(version.glob("data/*"))]
    for i, place in enumerate(places):
        out = tmp_path / f"m{i}"
        code, out_text, err = call(
            "train", *place, "--model", tiny_model, "--out", out, *FAST, "--json"
        )
        assert code == 0, err
        told.append(json.loads(out_text))
        assert (out / "model.safetensors").is_file()
    assert told[0]["dataset_version"] == f"mine/{version.name}"
    assert {line["loss_last"] for line in told} == {told[0]["loss_last"]}
    assert told[0]["steps"] == 4
    assert told[0]["rows"] == 20
    assert told[0]["loss_last"] < told[0]["loss_first"]


def test_options_dev_rows_and_text(call, tiny_model, tmp_path, version):
    pq.write_table(rows(5, 50), tmp_path / "dev.parquet")
    code, out, err = call(
        "train", version, "--model", tiny_model, "--out", tmp_path / "m", *FAST,
        "--dev", tmp_path / "dev.parquet", "--set", "objective=dft", "--set", "keep=best",
    )  # fmt: skip
    assert code == 0, err
    assert "at best" in out
    assert "chat template: none in the model" in out
    assert "training m" in err
    curve = pl.read_csv(tmp_path / "m" / "curve.csv")
    assert {"ce", "mean_weight", "dev_loss"} <= set(curve.columns)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "objektive=dft"], "unknown key 'objektive': did you mean 'objective'?"),
        (["--set", "keep=best"], "keep is 'best', but there are no dev rows"),
        (["--dev", "nothing"], "nothing has no Parquet file"),
    ],
)
def test_mistakes_are_one_line(call, tiny_model, tmp_path, version, arguments, said):
    code, _, err = call(
        "train", version, "--model", tiny_model, "--out", tmp_path / "m", *arguments
    )
    assert code == 1
    assert said in err
    assert "Traceback" not in err


def test_no_model_and_no_rows(call, tmp_path, version):
    assert "no model to start from" in call("train", version, "--out", tmp_path / "m")[2]
    (tmp_path / "empty").mkdir()
    code, _, err = call("train", tmp_path / "empty", "--model", "x", "--out", tmp_path / "m")
    assert code == 1
    assert "empty has no Parquet file: give a published version" in err


def test_a_recipe_gives_model_and_options(call, mini, tiny_model, tmp_path, version):
    recipe = mini()
    code, out, err = call(
        "train", version, "--recipe", "mini", "--model", tiny_model, "--out", tmp_path / "m",
        "--set", "epochs=1", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    config = json.loads((tmp_path / "m" / "training.json").read_text())["config"]
    assert config["learning_rate"] == recipe.training.options.learning_rate
    assert config["method"] == recipe.training.options.method
    assert told["rows_seen"] == 20
    said = call("train", version, "--recipe", "mini", "--root", tmp_path, "--out", tmp_path / "n")
    assert "no corpus at" in said[2] or "has not been trained" in said[2]


# ---- eval ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tiny, tmp_path_factory):
    """A model that has learned two answers by heart."""
    import torch

    from siftline.training.finetune import FineTune, finetune

    torch.set_num_threads(1)
    base = tiny.make_model(tmp_path_factory.mktemp("base") / "m")
    lines = [("1+1?", "#### 2"), ("2+2?", "#### 4")]
    turns = [[schema.message("user", q), schema.message("assistant", a)] for q, a in lines]
    data = pa.Table.from_pylist([schema.make_row(t) for t in turns], schema=schema.ROW)
    config = FineTune(learning_rate=1e-2, epochs=60, batch_rows=2, max_length=64)
    out = tmp_path_factory.mktemp("knowing") / "m"
    return finetune(base, data, out, config, seed=0, dataset_version="v").model_dir


def test_answers_are_graded_by_level_and_source(call, knowing, tmp_path):
    asked = [("1+1?", 2, 1, "a"), ("2+2?", 4, 2, "a"), ("3+3?", 6, 2, "b")]
    lines = [
        {"question": q, "solution": f"#### {a}", "level": level, "source": source}
        for q, a, level, source in asked
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["eval", knowing, path, "--out", tmp_path / "e", "--max-new-tokens", 12]
    arguments += ["--answer-pattern", "#### (.+)", "--field", "source=source"]
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    told = json.loads(out)
    lines = {(line["source"], line["level"]): line for line in told["accuracy"]}
    assert lines[None, "all"]["n"] == told["questions"] == 3
    assert lines[None, "all"]["correct"] == 2
    assert (lines[None, "1"]["correct"], lines[None, "2"]["n"]) == (1, 2)
    assert lines["a", "all"]["accuracy"] == 1.0
    assert lines["b", "all"]["accuracy"] == 0.0
    assert 0.2 < lines["a", "all"]["low"] < 0.5
    answers = pl.read_parquet(tmp_path / "e" / "answers.parquet")
    assert answers["correct"].sum() == 2
    written = {path.name: path for path in (tmp_path / "e").iterdir()}
    assert set(written) == {"answers.parquet", "accuracy.csv", "accuracy.json", "accuracy.png"}
    facts = json.loads(written["accuracy.json"].read_text())
    assert facts["accuracy"] == told["accuracy"]
    assert facts["settings"]["max_new_tokens"] == 12
    assert facts["settings"]["answer_pattern"] == "#### (.+)"
    assert len(facts["fingerprint"]) >= 32
    assert written["accuracy.png"].read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(*arguments)
    assert "accuracy all" in out
    assert "66.7 %" in out


def test_questions_without_answers_are_an_error(call, tiny_model, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    code, _, err = call("eval", tiny_model, path, "--out", tmp_path / "e")
    assert code == 1
    assert "none of 1 rows has an answer" in err
