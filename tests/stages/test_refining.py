"""Rounds of choosing, training and weighing: planted and pure, then on a tiny model in a recipe."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool
from siftline.recipe.parse import parse, scorers_read
from siftline.rows.ledger import KEPT
from siftline.rows.schema import digest
from siftline.selectors.method import applied, select
from siftline.selectors.rounds import KmeansRounds
from siftline.selectors.spending import Budget
from siftline.stages.run import models_used, outputs_so_far, run_stage
from siftline.stages.select import rounds as refining
from siftline.stages.select.options import Select
from siftline.workspace import Workspace

# ---- the course, with a caller that only pretends to train ---------------------------------------


def blobs(counts, seed=0, prefix="row"):
    """Rows in clusters far apart; which one a row is of stands in `truth`."""
    g = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(counts)), counts)
    x = 8 * np.eye(len(counts), 6)[truth] + 0.1 * g.normal(size=(len(truth), 6))
    embedding = pl.Series("embedding", x.astype(np.float32), dtype=pl.Array(pl.Float32, 6))
    ids = [digest(prefix, i) for i in range(len(truth))]
    frame = pl.DataFrame({"id": ids, "truth": truth, "n_tokens": g.integers(1, 30, len(truth))})
    return frame.with_columns(embedding)


def refined(method, pool, budget, worst=None, calls=None):
    """A plan where rows of the true cluster `worst` are still the furthest from learnt."""
    truth = dict(pool.select("id", "truth").iter_rows())

    def teach(number, ids):
        if calls is not None:
            calls.append((number, list(ids)))
        far = [1.0 * (truth[i] == worst) - 5 for i in ids]
        return pl.DataFrame({"id": ids, "difference": far})

    narrow = pool.drop("truth")
    return method.refine([method.summarise(narrow)], budget, teach)


def kept(plan):
    return plan.rows.filter("kept")["id"].to_list()


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(3, 25), min_size=2, max_size=5),
    st.one_of(st.just(0.0), st.floats(0.2, 0.9)),  # 0: the longest row, or a row a round
    st.integers(1, 4),
    st.sampled_from(["rows", "loss_tokens"]),
)
def test_a_budget_is_met_in_rounds(counts, share, rounds, unit):
    pool = blobs(counts)
    whole = pool.height if unit == "rows" else int(pool["n_tokens"].sum())
    budget = Budget(max(int(share * whole), rounds if unit == "rows" else 30), unit, "smaller")
    if budget.size >= whole:
        return
    calls = []
    method = KmeansRounds(clusters=len(counts), rounds=rounds)
    plan = refined(method, pool, budget, 0, calls)
    taken = pool.filter(pl.col("id").is_in(kept(plan)))
    spent = taken.height if unit == "rows" else taken["n_tokens"].sum()
    assert spent == plan.facts["spent"] <= budget.size
    assert spent == budget.size if unit == "rows" else spent > budget.size - 30
    by_round = [fact["picked"] for fact in plan.facts["rounds"]]
    taught = [number for number in range(rounds - 1) if by_round[number]]
    assert [number for number, _ in calls] == taught
    seen = [set(ids) for _, ids in calls]
    assert all(a <= b for a, b in zip(seen, [*seen[1:], set(kept(plan))], strict=False))
    assert sum(by_round) == len(kept(plan))
    table = plan.tables["rounds"]
    for number in range(1, rounds + 1):
        assert table.filter(round=number)["weight"].sum() == pytest.approx(1)


def test_a_round_whose_tokens_buy_nothing_teaches_nothing_and_keeps_the_weights():
    pool = blobs([6, 6]).with_columns(n_tokens=pl.lit(10))
    calls = []
    # Three tokens a round: the first row is drawn when four rounds' are together.
    method = KmeansRounds(clusters=2, rounds=4, quota="proportional")
    plan = refined(method, pool, Budget(12, "loss_tokens", "smaller"), 0, calls)
    assert [fact["picked"] for fact in plan.facts["rounds"]] == [0, 0, 0, 1]
    assert (plan.facts["spent"], len(kept(plan)), calls) == (10, 1, [])
    weights = plan.tables["rounds"].sort("round", "cluster")["weight"].to_list()
    assert weights == weights[:2] * 4
    with pytest.raises(ValueError, match="5 loss_tokens buys nothing, the shortest row"):
        refined(KmeansRounds(clusters=2, rounds=1), pool, Budget(5, "loss_tokens", "smaller"))


def test_the_cluster_whose_answers_are_worst_gains_in_the_next_round():
    pool = blobs([60, 60, 60, 60])
    truth = dict(pool.select("id", "truth").iter_rows())
    for worst in (1, 3):
        plan = refined(KmeansRounds(clusters=4), pool, Budget(72), worst)
        members = plan.tables["members"].drop_nulls("round")
        of = members.with_columns(truth=pl.col("id").replace_strict(truth))
        shares = [
            of.filter(round=r, truth=worst).height / of.filter(round=r).height for r in (1, 2, 3)
        ]
        assert shares[0] == 0.25 < shares[1] < shares[2]
    values = plan.rows.filter("kept")["value"]
    assert values.value_counts().sort("value")["count"].to_list() == [24, 24, 24]
    assert plan.rows.filter(~pl.col("kept"))["reason"].unique().to_list() == ["not_drawn"]
    assert plan.rows.filter("kept").sort("rank")["value"].is_sorted()


def test_first_weights_follow_the_quota_and_quality_draws_inside():
    pool = blobs([90, 30])
    for quota, expected in (("equal", [10, 10]), ("proportional", [15, 5])):
        plan = refined(KmeansRounds(clusters=2, rounds=1, quota=quota), pool, Budget(20))
        assert sorted(plan.tables["rounds"]["picked"], reverse=True) == expected
    quality = [50.0 if i < 10 else 1.0 * (i < 90) for i in range(120)]
    good = pool.with_columns(quality=pl.Series(quality))
    method = KmeansRounds(clusters=1, rounds=2, quality="quality")
    taken = refined(method, good, Budget(10), 0)
    assert sum(i in set(good["id"][:10]) for i in kept(taken)) >= 7
    with pytest.raises(ValueError, match="negative quality"):
        refined(method, good.with_columns(quality=-pl.col("quality")), Budget(10), 0)


def test_order_buckets_and_seeds():
    pool = blobs([30, 30, 30])
    method, budget = KmeansRounds(clusters=3), Budget(20)
    first = refined(method, pool, budget, 2)
    assert refined(method, pool.sample(fraction=1, shuffle=True, seed=1), budget, 2).rows.equals(
        first.rows
    )
    other = refined(KmeansRounds(clusters=3, seed=1), pool, budget, 2)
    assert kept(other) != kept(first)
    parts = [applied(part["id"], first).decisions for part in (pool[:40], pool[40:])]
    assert pl.concat(parts).filter("kept").height == 20


def test_all_or_too_little():
    pool = blobs([5, 5])
    calls = []
    plan = refined(KmeansRounds(), pool, Budget(30, on_shortfall="smaller"), 0, calls)
    assert plan.vacuous
    assert not calls
    assert plan.facts["shortfall"] == 20
    with pytest.raises(ValueError, match="budget is 30 rows"):
        refined(KmeansRounds(), pool, Budget(30), 0)
    with pytest.raises(ValueError, match="rounds is 3: give 1 to 2"):
        refined(KmeansRounds(clusters=2), pool, Budget(2), 0)
    with pytest.raises(ValueError, match="give it to a recipe"):
        select(KmeansRounds(), pool.drop("truth"), Budget(2))
    for wrong in ({"rounds": 0}, {"floor": 1.0}, {"temperature": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KmeansRounds(**wrong)


# ---- the stage: a tiny model is trained, answers, and is scored ----------------------------------


TRAINED = {"learning_rate": 1.0e-3, "batch_rows": 4}


def differences(folder, rows):
    """By plain transformers: mean loss of the given answer less that of the greedy one, by id."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def loss(prompt, answer):
        ids = tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        logits = model(ids).logits[0, start - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, start:]))

    found = {}
    for row in rows:
        prompt = f"Question: {row['messages'][0]['content']}\nAnswer:"
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        own = tokenizer.decode(out, skip_special_tokens=True).strip()
        given = row["messages"][-1]["content"]
        texts = [f" {text}<eos>" if text else "<eos>" for text in (given, own)]
        found[row["id"]] = loss(prompt, texts[0]) - loss(prompt, texts[1])
    return found


@pytest.fixture
def chain(tiny_model, tmp_path, monkeypatch):
    """`chain(options, ...)` is a workspace and a recipe with two rounds; its pool is built."""
    from siftline.assets.shared import build

    scorer = ModuleType("scorer_of_answers")
    scorer.given = lambda rows: [float("blue" in r["messages"][-1]["content"]) for r in rows]
    monkeypatch.setitem(sys.modules, "scorer_of_answers", scorer)

    def write(turn=1):
        lines = [{"prompt": f"{i}+{i}?", "completion": f"It is {2 * i}."} for i in range(16)]
        lines += [
            {"prompt": "Colours of " + "the sea " * (2 + i % 9) + f"{i}?", "completion": "blue"}
            for i in range(16)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines[::turn])
        (tmp_path / "pool.jsonl").write_text(text, encoding="utf-8")

    def made(options=None, root="root", turn=1, **changes):
        write(turn)
        method = {"rounds": 2, "clusters": 2, "max_new_tokens": 8, **(options or {})}
        stage = {"select": {"method": "kmeans_quality_rounds", "options": method}}
        data = {
            "name": "chain",
            "pool": {
                "name": "all",
                "buckets": 2,
                "inputs": [{"path": str(tmp_path / "pool.jsonl"), "source": "one"}],
            },
            "models": {"tiny": {"path": str(tiny_model), "device": "cpu", "max_length": 160}},
            "scorers": {"blue": {"kind": "function", "path": "scorer_of_answers:given"}},
            "budget": {"unit": "rows", "size": 12, "on_shortfall": "smaller"},
            "training": {"options": TRAINED},
        }
        recipe = parse({**data, "stages": [stage], **changes})
        workspace = Workspace(tmp_path / root)
        build(workspace, recipe, "all", lambda line: None)
        return workspace, recipe

    return made


def run(workspace, recipe):
    return run_stage(workspace, recipe, "select", lambda line: None)


def decided(output):
    return output.all_decisions().sort("id")


def test_two_rounds_train_answer_and_weigh(chain, forwards):
    workspace, recipe = chain()
    stage = recipe.stage("select")
    assert models_used(recipe, stage) == ("target", "embedder")
    output, _ = run(workspace, recipe)
    assert output.accounting.closes
    assert output.accounting.kept == 12
    (model,) = workspace.root.glob("models/chain-select-r1-*")
    card = json.loads((model / "training.json").read_text())["facts"]
    assert (card["rows_seen"], card["rows"]) == (6, 6)  # one pass over the first round
    first, second = output.facts["rounds"]
    assert (first["picked"], second["picked"]) == (6, 6)
    assert first["scored"] == 6
    assert "scored" not in second
    members = output.table("members")
    kept_ids = decided(output).filter(outcome=KEPT)["id"].to_list()
    assert sorted(members.drop_nulls("round")["id"]) == kept_ids
    rounds = output.table("rounds").filter(round=1)
    assert rounds["scored"].to_list() == rounds["picked"].to_list() == [3, 3]
    by_hand = differences(model, Pool(workspace.pool("all")).all_rows().to_pylist())
    drawn = members.filter(round=1).with_columns(d=pl.col("id").replace_strict(by_hand))
    means = drawn.group_by("cluster").agg(pl.col("d").mean()).sort("cluster")["d"]
    assert rounds["difference"].to_list() == pytest.approx(means.to_list(), abs=1e-4)
    weights = output.table("rounds").filter(round=2)["weight"]
    assert weights.arg_max() == rounds["difference"].arg_max()
    assert forwards["generate"] == 6
    # How rounds are trained is part of what the output is named by; how often they save is not.
    _, slower = chain(training={"options": {"learning_rate": 1.0e-5, "batch_rows": 4}})
    assert not outputs_so_far(workspace, slower)
    _, saved = chain(training={"options": {**TRAINED, "save_steps": 7}})
    assert len(outputs_so_far(workspace, saved)) == 1
    _, again = chain(turn=-1, root="turned")
    other, _ = run(Workspace(workspace.root.with_name("turned")), again)
    assert decided(other).equals(decided(output))
    assert other.facts == output.facts


def test_a_scorer_of_the_recipe_may_compare(chain):
    tokens = {"unit": "loss_tokens", "size": 120, "on_shortfall": "smaller"}
    workspace, recipe = chain({"compare": "blue"}, budget=tokens)
    assert scorers_read(recipe.stage("select")) == ("blue",)
    output, _ = run(workspace, recipe)
    assert 120 - 6 < output.facts["spent"] <= 120  # the shortest row has six tokens
    assert [r["spent"] for r in output.facts["rounds"]] == pytest.approx([60, 60], abs=6)
    rounds = output.table("rounds").filter(round=1)
    # No answer of an untrained model is right: rows with a right one have all to teach.
    assert sorted(rounds["difference"]) == [0.0, 1.0]
    weights = output.table("rounds").filter(round=2)["weight"]
    assert weights.arg_max() == rounds["difference"].arg_max()
    assert weights.max() > 0.8
    second = output.table("rounds").filter(round=2)["picked"]
    assert second.arg_max() == weights.arg_max()
    assert second.max() >= 7
    with pytest.raises(ValueError, match="no scorer 'blu': did you mean 'blue'"):
        chain({"compare": "blu"})
    column = {"blue": {"kind": "column", "column": "blue"}}
    workspace, recipe = chain({"compare": "blue"}, scorers=column)
    with pytest.raises(ValueError, match="reads a column, which a model's answers have not"):
        run(workspace, recipe)


def test_a_stage_killed_twice_goes_on_to_the_same_bytes(chain, monkeypatch, forwards):
    options = {"rounds": 3}
    whole, recipe = chain(options)
    expected, _ = run(whole, recipe)
    asked = dict(forwards)
    forwards.clear()
    cut, again = chain(options, root="cut")
    trained = []
    with monkeypatch.context() as patch:
        real = refining.finetune

        def second_dies(*given, **named):
            trained.append(given[2].name)
            if len(trained) == 2:
                raise KeyboardInterrupt
            return real(*given, **named)

        patch.setattr(refining, "finetune", second_dies)
        with pytest.raises(KeyboardInterrupt):
            run(cut, again)
    assert forwards["generate"] == 4
    with monkeypatch.context() as patch:
        real_scores = refining.score_likelihood

        def second_dies_scoring(recorder, *rest):
            if "-r2-" in recorder.spec.path:
                raise KeyboardInterrupt
            return real_scores(recorder, *rest)

        patch.setattr(refining, "score_likelihood", second_dies_scoring)
        with pytest.raises(KeyboardInterrupt):
            run(cut, again)
    second, fresh = run(cut, again)
    assert fresh
    assert decided(second).equals(decided(expected))
    assert second.manifest.version == expected.manifest.version
    assert second.facts == expected.facts
    assert forwards == asked  # nothing was asked for twice
    names = [sorted(p.name for p in w.root.glob("models/*")) for w in (whole, cut)]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_a_row_without_an_answer_is_asked_again_at_the_next_run(chain, monkeypatch):
    workspace, recipe = chain()
    whole = refining.draw_samples
    lost = []

    def times_out(recorder, bucket, tokens, *rest):
        drawn, failed = whole(recorder, bucket, tokens, *rest)
        if not lost or lost[0] in tokens:
            lost[:] = [min(tokens)]
            drawn, failed = drawn.filter(pl.col("prompt_id") != lost[0]), {lost[0]: "timeout"}
        return drawn, failed

    with monkeypatch.context() as patch:
        patch.setattr(refining, "draw_samples", times_out)
        first, _ = run(workspace, recipe)
    assert (first.facts["rounds"][0]["scored"], first.facts["unanswered"]) == (5, 1)
    second, fresh = run(workspace, recipe)
    assert (fresh, second.facts["rounds"][0]["scored"], second.facts["unanswered"]) == (True, 6, 0)
    assert not run(workspace, recipe)[1]


def test_a_training_method_of_ones_own_says_how_it_is_taught(monkeypatch):
    module = ModuleType("own_rounds")

    @dataclass(frozen=True)
    class Own:
        needs: ClassVar = ("training",)
        compare: str = "perplexity"

        def summarise(self, bucket): ...
        def decide(self, states, budget, target=None): ...
        def apply(self, bucket, plan): ...
        def refine(self, states, budget, teach): ...

    @dataclass(frozen=True)
    class Whole(Own):
        max_new_tokens: int = 8
        seed: int = 0

    module.Own, module.Whole = Own, Whole
    monkeypatch.setitem(sys.modules, "own_rounds", module)
    with pytest.raises(ValueError, match="training and has no option max_new_tokens, seed"):
        Select("own_rounds:Own")
    assert Select("own_rounds:Whole", seed=3).configured().seed == 3


def test_a_model_that_has_no_room_to_answer_is_told(chain, tiny_model):
    short = {"tiny": {"path": str(tiny_model), "device": "cpu", "max_length": 16}}
    workspace, recipe = chain(models=short)
    with pytest.raises(ValueError, match=r"none of 6 rows could be scored.*raise the model's"):
        run(workspace, recipe)
