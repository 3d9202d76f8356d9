"""Retained test sets: tasks the base model could do before, told apart from the one trained for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest

from siftline.ingest.pool import Pool
from siftline.stages import evaluation
from siftline.stages.evaluation import RETAINED, SOURCE, evaluate_arms
from siftline.stages.reporting import _notes
from siftline.training.evaluate import RESULT
from siftline.workspace import Workspace


def quiet(line): ...


def answers(rights):
    return pl.DataFrame(
        {
            "id": [f"q{i}" for i in range(len(rights))],
            "level": ["easy"] * len(rights),
            "response": ["x"] * len(rights),
            "correct": rights,
            "reason": ["match"] * len(rights),
            "finish_reason": ["stop"] * len(rights),
        },
        schema=RESULT,
    )


@pytest.fixture
def recipe(mini):
    """The mini recipe with its dev set as a second, retained test set, and nothing trained."""
    made = mini()
    (dev,) = made.sets.dev
    sets = replace(made.sets, test=(*made.sets.test, dev), dev=())
    settings = replace(made.evaluation, retained=(dev.name,))
    return replace(made, sets=sets, training=None, evaluation=settings)


def test_a_retained_set_has_a_line_of_its_own_and_no_part_in_the_rest(
    finished, recipe, mini_tools, tmp_path
):
    root = mini_tools.copy_root(finished.root, tmp_path / "root")
    workspace = Workspace(root)
    table, arms = evaluate_arms(workspace, recipe, quiet)
    assert arms == []
    lines = {line["level"]: line for line in table.to_dicts()}
    assert lines[f"{RETAINED}mini_dev"]["n"] == Pool(workspace.pool("mini_dev")).manifest.rows(
        "rows"
    )
    assert lines["all"]["n"] == Pool(workspace.pool("mini_test")).manifest.rows("rows")
    assert list(lines)[-1] == "all"


def test_the_change_is_that_of_the_same_questions(monkeypatch, recipe, tmp_path):
    """Base right on 3 of 4 retained questions; the arm's two seeds on 2 and 1 of them."""
    questions = pl.DataFrame(
        {
            "id": [f"q{i}" for i in range(8)],
            "set": ["mini_test"] * 4 + ["mini_dev"] * 4,
            "source": ["a", "a", "b", "b", "c", "c", "c", "c"],
        }
    )
    runs = {
        "base": answers([False] * 4 + [True, True, True, False]),
        0: answers([True] * 4 + [True, True, False, False]),
        1: answers([True] * 4 + [True, False, False, False]),
    }
    folders = {tmp_path / str(k): run for k, run in runs.items()}
    arms = [
        evaluation.Arm("curated", seed, tmp_path / str(seed), pl.DataFrame(), 1, 1)
        for seed in (0, 1)
    ]
    monkeypatch.setattr(evaluation, "train_arms", lambda *_: arms)
    monkeypatch.setattr(evaluation, "test_rows", lambda *_: questions)
    spec = type("Spec", (), {"path": str(tmp_path / "base")})
    monkeypatch.setattr(evaluation, "model_spec", lambda *_: spec)
    monkeypatch.setattr(evaluation, "evaluated", lambda w, r, folder, q, p: folders[folder])
    table, _ = evaluate_arms(Workspace(tmp_path), replace(recipe, training=object()), quiet)
    lines = {(line["arm"], line["level"]): line for line in table.to_dicts()}
    kept = lines["curated", f"{RETAINED}mini_dev"]
    assert kept["accuracy"] == pytest.approx(0.375)
    assert kept["change"] == pytest.approx(0.375 - 0.75)
    assert kept["change_low"] < kept["change"] < kept["change_high"]
    assert lines["curated", "all"]["accuracy"] == 1.0
    assert lines["base", f"{RETAINED}mini_dev"]["change"] is None
    said = [note for note in _notes([], table) if "retained" in note]
    assert said[0].startswith(
        "Arm curated on retained mini_dev: 37.5 %, -37.5 points against the base model ("
    )
    parts = [lines["curated", f"{SOURCE}{name}"]["n"] for name in "ab"]
    assert parts == [2, 2]
    assert ("curated", f"{SOURCE}c") not in lines
    # One question has no interval, and ends no run after hours of training.
    monkeypatch.setattr(evaluation, "test_rows", lambda *_: questions.head(5))
    for folder, run in list(folders.items()):
        folders[folder] = run.head(5)
    table, _ = evaluate_arms(Workspace(tmp_path), replace(recipe, training=object()), quiet)
    (line,) = table.filter(arm="curated", level=f"{RETAINED}mini_dev").to_dicts()
    assert (line["n"], line["change"], line["change_low"]) == (1, None, None)


def test_a_set_without_answers_is_refused_before_training(
    finished, recipe, mini_tools, tmp_path, monkeypatch
):
    workspace = Workspace(mini_tools.copy_root(finished.root, tmp_path / "root"))
    read = Pool.all_rows

    def unanswered(pool, columns=None):
        rows = read(pool, columns)
        if "mini_test" in str(pool.folder):
            place = rows.schema.get_field_index("answer")
            return rows.set_column(place, "answer", pa.nulls(len(rows), pa.string()))
        return rows

    monkeypatch.setattr(Pool, "all_rows", unanswered)
    monkeypatch.setattr(evaluation, "train_arms", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="has no test rows with an answer"):
        evaluate_arms(workspace, replace(recipe, training=object()), quiet)


def test_levels_are_those_of_now_and_null_is_none(finished, mini, mini_tools, tmp_path):
    workspace = Workspace(mini_tools.copy_root(finished.root, tmp_path / "root"))
    recipe = mini()
    questions = evaluation.test_rows(workspace, recipe, "level")
    base = Path(evaluation.model_spec(workspace, recipe, "target").path)
    renamed = questions.with_columns(level=pl.lit("other"))
    progress = SimpleNamespace(reach=lambda *_: pytest.fail("it was asked again"))
    found = evaluation.evaluated(workspace, recipe, base, renamed, progress)
    assert found.height == questions.height
    assert found["level"].unique().to_list() == ["other"]

    class Provenance:
        buckets = 1

        def read(self, *_):
            lines = [{"id": "a", "leftover": '{"level": null}'}, {"id": "b", "leftover": None}]
            return pa.Table.from_pylist([*lines, {"id": "c", "leftover": '{"level": 3}'}])

    assert evaluation._levels(Provenance(), "level") == {"c": "3"}
    with pytest.raises(ValueError, match="level_column is 'source', which is no level"):
        evaluation.test_rows(workspace, recipe, "source")


def test_a_recipe_names_sets_that_are_there(mini):
    with pytest.raises(ValueError, match=r"evaluation\.retained: no test set 'old'"):
        mini("evaluation.retained=[old]")
    with pytest.raises(ValueError, match="names every test set"):
        mini("evaluation.retained=[mini_test]")
