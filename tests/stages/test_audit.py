"""`siftline audit`: sheets of removed rows, labels that last, and the rate they give."""

import csv
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from siftline.cli import cli
from siftline.rows.ledger import REMOVED
from siftline.stages import audit as sheets
from siftline.stages.run import outputs
from siftline.training.intervals import wilson
from siftline.workspace import Workspace


@pytest.fixture
def call(finished, mini, mini_tools, tmp_path):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    mini()

    def called(*arguments):
        done = CliRunner().invoke(cli, ["audit", "mini", "--root", str(root), *map(str, arguments)])
        if done.exit_code:
            raise done.exception
        return done.stdout

    called.root = root
    return called


def lines_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill(path, label_of):
    lines = lines_of(path)
    for line in lines:
        line["label"] = label_of(line)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def test_a_sheet_shows_removed_rows_and_the_rate_follows_the_labels(call, mini):
    said = json.loads(call("--stage", "duplicates", "-n", 6, "--json"))
    gone = {
        stage.name: output.all_decisions().filter(outcome=REMOVED)
        for stage, output in outputs(Workspace(call.root), mini())
    }["duplicates"]
    assert said["removed"] == gone.height >= said["drawn"] == 6
    assert said["rate"] is None
    lines = lines_of(said["sheet"])
    assert {line["id"] for line in lines} <= set(gone["id"])
    assert all(line["matched_prompt"] and line["prompt"] for line in lines)
    wrong = {lines[0]["id"], lines[3]["id"]}
    marks = {lines[5]["id"]: "unsure"}
    fill(said["sheet"], lambda x: marks.get(x["id"], "wrong" if x["id"] in wrong else "Right "))
    rated = json.loads(call("--stage", "duplicates", "-n", 6, "--json"))
    expected = wilson(2, 5)
    assert (rated["labelled"], rated["unsure"], rated["false_drops"]) == (5, 1, 2)
    assert (rated["rate"], rated["low"], rated["high"]) == (0.4, expected.low, expected.high)
    assert sum(line["false_drops"] for line in rated["by_reason"].values()) == 2
    assert "false drops 40.0 % (" in call("--stage", "duplicates", "-n", 6)
    done = {stage.name: output for stage, output in outputs(Workspace(call.root), mini())}
    assert done["duplicates"].manifest.version[:12] in Path(said["sheet"]).name


def test_a_larger_sheet_keeps_rows_and_labels(call):
    small = json.loads(call("--stage", "verify", "-n", 4, "--json"))
    first = [line["id"] for line in lines_of(small["sheet"])]
    fill(small["sheet"], lambda line: "right")
    large = json.loads(call("--stage", "verify", "-n", 9, "--json"))
    lines = lines_of(large["sheet"])
    assert [line["id"] for line in lines[:4]] == first
    assert [line["label"] for line in lines] == ["right"] * 4 + [""] * 5
    assert large["sheet"] == small["sheet"]
    other = json.loads(call("--stage", "verify", "-n", 9, "--seed", 1, "--json"))
    assert {line["id"] for line in lines_of(other["sheet"])} != {line["id"] for line in lines}


def test_labels_survive_a_spreadsheet_and_a_smaller_call_loses_none(call):
    said = json.loads(call("--stage", "verify", "-n", 9, "--json"))
    fill(said["sheet"], lambda line: "right")
    text = Path(said["sheet"]).read_text(encoding="utf-8")
    Path(said["sheet"]).write_text(text, encoding="utf-8-sig")
    assert json.loads(call("--stage", "verify", "-n", 9, "--json"))["labelled"] == 9
    with pytest.raises(ValueError, match="labels of 5 rows that this call does not draw"):
        call("--stage", "verify", "-n", 4)
    assert [line["label"] for line in lines_of(said["sheet"])] == ["right"] * 9


def test_what_a_row_overlapped_is_shown(call):
    said = json.loads(call("--stage", "decontamination", "--json"))
    lines = lines_of(said["sheet"])
    assert lines
    assert all(line["matched_prompt"] for line in lines)


def test_what_is_wrong_is_said_in_one_line(call, tmp_path):
    with pytest.raises(ValueError, match="has no stage 'verfy'"):
        call("--stage", "verfy")
    with pytest.raises(ValueError, match="removed no row"):
        call("--stage", "rejection_sampling")
    sheet = json.loads(call("--stage", "verify", "--json"))["sheet"]
    fill(sheet, lambda line: "maybe")
    with pytest.raises(ValueError, match="labelled 'maybe': use right, wrong, unsure"):
        call("--stage", "verify")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns label and id"):
        call("--stage", "verify", "--sheet", tmp_path / "no.csv")
    with pytest.raises(ValueError, match="asks on a terminal"):
        call("--stage", "duplicates", "--label")


def test_rates_of_no_and_of_all_labels():
    drawn = pl.DataFrame({"id": ["a", "b"], "reason": ["x", "y"]})
    assert sheets.rate(drawn, {}, 7)["rate"] is None
    all_wrong = sheets.rate(drawn, {"a": "wrong", "b": "wrong", "z": "right"}, 7)
    assert (all_wrong["labelled"], all_wrong["rate"], all_wrong["high"]) == (2, 1.0, 1.0)


def test_a_sheet_holds_no_formula(tmp_path):
    said = {"prompt": "=1+1", "response": "-2", "answer": "@x", "reason": "plain", "value": -0.5}
    drawn = pl.DataFrame([dict.fromkeys(sheets.SHEET[1:]) | {"id": "a" * 40, **said}])
    sheets.write_sheet(tmp_path / "s.csv", drawn, {"a" * 40: "right"})
    (line,) = lines_of(tmp_path / "s.csv")
    cells = [line[name] for name in said]
    assert cells == ["'=1+1", "'-2", "'@x", "plain", "-0.5"]
    assert sheets.read_labels(tmp_path / "s.csv") == {"a" * 40: "right"}
