"""Stages that draw, run as a recipe runs them, with scripted models and verifiers that fail."""

import pytest

from siftline.assets.shared import build
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import parse
from siftline.scoring.verifiers.own import OwnVerifier
from siftline.stages import models
from siftline.stages.rejection_sampling import notes
from siftline.stages.rejection_sampling import problems as grading
from siftline.stages.reporting import _notes
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

COLUMNS = {"question": "question", "response": "response", "answer": "answer", "source": "source"}
HANGING = """
import time
from siftline.scoring.verifiers import Verdict, verify_math

def check(response, answer):
    while {hangs}:
        time.sleep(0.01)
    return verify_math(response, answer)
"""


def quiet(line): ...


@pytest.fixture
def staged(scripted, tokenizer, tiny_model, tmp_path, monkeypatch):
    """`staged(stage, votes)` is a workspace with a pool of sums, and a recipe of one stage."""

    def made(stage, votes=None):
        says = scripted.noisy_sampler(0.6)
        engine = scripted.Scripted("base", tokenizer, says, votes)
        monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
        pool = scripted.make_world(10, referenced=1.0).write(tmp_path / "in")
        inputs = [{"path": str(pool), "layout": "question_answer", "columns": COLUMNS}]
        recipe = parse(
            {
                "name": "sums",
                "pool": {"name": "sums", "buckets": 2, "inputs": inputs},
                "models": {"base": {"path": str(tiny_model), "max_length": 512, "device": "cpu"}},
                "roles": {"target": "base"},
                "stages": [stage],
                "budget": {"size": 10, "unit": "rows"},
            }
        )
        build(Workspace(tmp_path), recipe, "sums", quiet)
        return Workspace(tmp_path), recipe

    return made


def sampled(verifier):
    options = {"target": "uniform", "k": 2, "pilot": 2, "cap": 4, "verifier": verifier}
    return {"rejection_sampling": {**options, "max_new_tokens": 16}}


def same_answer(scripted, prompt):
    one, other = prompt.split("Answer 1:")[1].split("Do both")[0].split("Answer 2:")
    equal = (scripted.said(one) or int(one)) == (scripted.said(other) or int(other))
    return scripted.logs(0.99, 0.01) if equal else scripted.logs(0.01, 0.99)


def test_a_judges_outage_is_no_verdict_on_the_prompts(scripted, staged):
    dead = [float("nan")] * 2
    out = {"all"}

    def votes(prompt, options):
        if "all" in out or ("some" in out and "What is 3 + 5?" in prompt):
            return dead
        return same_answer(scripted, prompt)

    workspace, recipe = staged(sampled("judge"), votes)
    with pytest.raises(RuntimeError, match="verifier 'judge' gave no verdict on any of 20 draws"):
        run_stage(workspace, recipe, "rejection_sampling", quiet)
    out.clear()
    out.add("some")
    output, _ = run_stage(workspace, recipe, "rejection_sampling", quiet)
    assert output.facts["unanswered"] == output.facts["verifier_errors"] > 0
    assert output.facts["refused"]["verifier_error"] == output.facts["verifier_errors"]
    assert output.facts["correct"] > 0, output.facts
    notes = _notes([(recipe.stages[0], output)], None)
    assert any("the verifier failed on" in note for note in notes)
    assert any("asked again next run" in note for note in notes)
    out.clear()
    output, computed = run_stage(workspace, recipe, "rejection_sampling", quiet)
    assert (computed, output.facts["unanswered"], output.facts["verifier_errors"]) == (True, 0, 0)
    assert not any("verifier failed" in n for n in _notes([(recipe.stages[0], output)], None))
    assert not run_stage(workspace, recipe, "rejection_sampling", quiet)[1]


@pytest.mark.parametrize("hangs", ["True", 'answer == "8"'])
def test_a_verifier_that_hangs_costs_its_time_and_no_prompt(staged, tmp_path, monkeypatch, hangs):
    name = f"hanging_{len(hangs)}:check"
    (tmp_path / f"hanging_{len(hangs)}.py").write_text(HANGING.format(hangs=hangs))
    monkeypatch.syspath_prepend(str(tmp_path))
    own = OwnVerifier(name, timeout=20)
    own("#### 1", "1") if hangs != "True" else None  # its imports are not what the limit is for
    own.timeout = 0.05 if hangs == "True" else 1.0
    monkeypatch.setattr(grading, "get_verifier", lambda name: own)
    workspace, recipe = staged(sampled(name))
    try:
        if hangs == "True":
            with pytest.raises(RuntimeError, match="no verdict on any of 20 draws, first: timeout"):
                run_stage(workspace, recipe, "rejection_sampling", quiet)
        else:
            output, _ = run_stage(workspace, recipe, "rejection_sampling", quiet)
            assert output.facts["unanswered"] == output.facts["verifier_errors"] > 0
            assert output.facts["correct"] > 0
    finally:
        own.close()


def test_notes_name_capped_prompts_and_both_pass_rates_without_a_correlation():
    rates = {"prompts": 3, "target": 0.5, "sampler": 1.0, "correlation": None}
    ends = {"unsolved": 2, "capped": 1, "met": 4}
    facts = {"targets": ends, "refused": {}, "draws": 9, "pass_rates": rates}
    first, second, third = notes(Stage("more", "rejection_sampling", None), facts)
    assert "status unsolved" in first
    assert second.startswith("more: 1 prompts reached the cap")
    assert "status capped" in second
    assert third.endswith("on 3 prompts are 50.0 % and 100.0 %, no correlation.")
    none = {**rates, "prompts": 0, "target": None, "sampler": None}
    assert len(notes(Stage("more", "rejection_sampling", None), {**facts, "pass_rates": none})) == 2


def test_self_answers_as_a_stage(scripted, staged):
    """Every row is kept or replaced by what the model says itself, and a second run finds that."""
    stage = {"s3ft": {"draws": 3, "paraphrases": 1, "max_new_tokens": 16}}
    workspace, recipe = staged(stage)
    output, computed = run_stage(workspace, recipe, "s3ft", quiet)
    routes, account = output.facts["routes"], output.accounting
    assert computed
    assert sum(routes.values()) == 10
    assert routes["own_answer"] > 0
    assert account.closes
    assert account.added == routes["own_answer"] + routes["paraphrase"]
    added = [row for b in (0, 1) for row in output.added(b).to_pylist()]
    assert len(added) == account.added
    for row in added:
        texts = [m["content"] for m in row["messages"]]
        assert scripted.said(texts[-1]) == scripted.truth(texts[0])
        assert row["origin"].startswith("s3ft ")
    assert not run_stage(workspace, recipe, "s3ft", quiet)[1]
