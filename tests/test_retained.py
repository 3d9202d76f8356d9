"""Retained test sets: tasks the base model could do before, told apart from the one trained for."""

from dataclasses import replace

import polars as pl
import pytest

from siftline.ingest.pool import Pool
from siftline.stages import evaluation
from siftline.stages.evaluation import RETAINED, evaluate_arms
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
        {"id": [f"q{i}" for i in range(8)], "set": ["mini_test"] * 4 + ["mini_dev"] * 4}
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
    monkeypatch.setattr(evaluation, "_evaluated", lambda w, r, folder, q, p: folders[folder])
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


def test_a_recipe_names_sets_that_are_there(mini):
    with pytest.raises(ValueError, match=r"evaluation\.retained: no test set 'old'"):
        mini("evaluation.retained=[old]")
    with pytest.raises(ValueError, match="names every test set"):
        mini("evaluation.retained=[mini_test]")
