"""Auto-Correct: folds, verdicts and decisions by themselves, then the stage on a scripted world."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.assets.shared import build
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import parse
from siftline.report.story import explain
from siftline.rows.ledger import KEPT, REMOVED
from siftline.rows.schema import digest
from siftline.scoring.measures.pairwise import preference
from siftline.stages import models
from siftline.stages.correct import notes
from siftline.stages.correct import run as correcting
from siftline.stages.correct.decide import ADOPTED, PROPOSALS, CorrectionRule, fold_of, judged_facts
from siftline.stages.run import outputs_so_far, run_stage
from siftline.workspace import Workspace

# ---- folds -----------------------------------------------------------------------------------

prompts = st.lists(st.integers(0, 10**9).map(lambda n: digest(n)[:20]), max_size=60, unique=True)


@settings(max_examples=40, deadline=None)
@given(prompts, st.integers(1, 7), st.integers(0, 99), st.randoms())
def test_a_prompt_has_one_fold_whatever_stands_beside_it(ids, folds, seed, random):
    whole = dict(zip(ids, fold_of(ids, folds, seed).tolist(), strict=True))
    assert set(whole.values()) <= set(range(folds))
    some = [i for i in ids if random.random() < 0.5]
    random.shuffle(some)
    assert fold_of(some, folds, seed).tolist() == [whole[i] for i in some]


def test_folds_are_of_one_size_and_follow_the_seed():
    ids = [digest(i)[:20] for i in range(6000)]
    for folds in (2, 3, 5):
        counts = np.bincount(fold_of(ids, folds, 0), minlength=folds)
        assert np.abs(counts - 6000 / folds).max() < 4 * np.sqrt(6000 / folds)
    assert (fold_of(ids, 2, 0) != fold_of(ids, 2, 1)).mean() > 0.4


# ---- verdicts --------------------------------------------------------------------------------

shares = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(shares, shares)
def test_a_verdict_needs_both_orders_and_has_no_side(p, q):
    verdict, confidence = preference(p, q)
    if (p - 0.5) * (q - 0.5) > 0:
        assert verdict == ("candidate" if p > 0.5 else "original")
        assert confidence == pytest.approx((p + q) / 2 if p > 0.5 else 1 - (p + q) / 2)
        assert 0.5 < confidence <= 1.0
    else:
        assert (verdict, confidence) == (None, None)
    other = {"candidate": "original", "original": "candidate", None: None}
    assert preference(1 - p, 1 - q)[0] in (other[verdict], None)  # None where 1 - p rounds to 0.5


def test_nothing_is_preferred_where_a_share_is_missing():
    assert preference(float("nan"), 0.9) == (None, None)


def plain_outcome(line, bound):
    """The rule, spelled out."""
    if line["barred"]:
        return line["barred"]
    if line["verdict"] is None:
        return "undecided"
    if line["verdict"] == "original":
        return "original_better"
    if not line["confidence"] > bound:
        return "unsure"
    return "corrected" if line["in_play"] else "rescued"


lines = st.fixed_dictionaries(
    {
        "in_play": st.booleans(),
        "barred": st.sampled_from([None, None, "same_answer", "judge_failed"]),
        "verdict": st.sampled_from([None, "candidate", "original"]),
        "confidence": st.sampled_from([0.6, 0.8, 0.8000001, 1.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(lines, max_size=30), st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0, 1.01]))
def test_outcomes_are_the_rule(given_lines, bound):
    frame = pl.DataFrame(
        [{"id": str(i), **line} for i, line in enumerate(given_lines)], schema=PROPOSALS
    )
    found = CorrectionRule(bound).outcomes(frame).to_list()
    assert found == [plain_outcome(line, bound) for line in given_lines]
    if bound >= 1:
        assert not set(found) & set(ADOPTED)


def test_what_a_judge_did_is_counted():
    columns = ("barred", "verdict", "as_second", "as_first")
    told = [
        (None, "candidate", 0.9, 0.9),
        (None, "original", 0.2, 0.3),
        (None, None, 0.1, 0.9),  # always the first
        (None, None, 0.8, 0.3),  # always the second
        (None, None, 0.5, 0.5),
        ("judge_failed", None, None, None),
        ("same_answer", None, None, None),
    ]
    types = [pl.String, pl.String, pl.Float64, pl.Float64]
    frame = pl.DataFrame(told, schema=dict(zip(columns, types, strict=True)), orient="row")
    assert judged_facts(frame) == {
        "asked": 6,
        "failed": 1,
        "candidate": 1,
        "original": 1,
        "undecided": 3,
        "always_first": 1,
        "always_second": 1,
    }


def test_bounds_and_folds_are_checked():
    with pytest.raises(ValueError, match=r"confidence is -0\.1"):
        CorrectionRule(-0.1)
    for options, says in (
        ({"folds": 0}, "folds is 0"),
        ({"training": {"keep": "best"}}, "keep last"),
        ({"training": {"objective": "poft"}}, "reference scores"),
        ({"training": {"epochs": 0}}, "epochs 0"),
        ({"training": {"phases": [{"sources": {"a": 1.0}, "share": 1.0}]}}, "phases name sources"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=f"stages.correct.*{says}"):
            recipe_of(Path("pool.jsonl"), Path("model"), correct=options)
    with pytest.raises(ValueError, match="correct mends what confidence judged: put it after"):
        recipe_of(Path("pool.jsonl"), Path("model"), stages=["correct"])


# ---- the stage on a scripted world -------------------------------------------------------------


COLUMNS = {name: name for name in ("question", "response", "answer", "source")}


def recipe_of(pool, folder, correct=None, confidence=None, stages=None, **changes):
    gate = {"reflection": "on", "threshold": "quantile", "cut": 0.1, **(confidence or {})}
    body = {
        "name": "fix",
        "pool": {
            "name": "fix",
            "buckets": 2,
            "inputs": [{"path": str(pool), "layout": "question_answer", "columns": COLUMNS}],
        },
        "models": {"base": {"path": str(folder)}},
        "stages": stages or [{"confidence": gate}, {"correct": correct or {}}],
        "budget": {"size": 10, "unit": "rows"},
        **changes,
    }
    return parse(body)


class Lab:
    """A root with a pool, scripted engines by model folder, and proposers that only take notes."""

    def __init__(self, root, folder, tokenizer, world, scripted, monkeypatch):
        self.workspace, self.folder, self.world = Workspace(root), folder, world
        self.tokenizer, self.scripted = tokenizer, scripted
        self.pool = world.write(root / "in")
        self.says = scripted.noisy_sampler(0.6)
        self.votes = scripted.noisy_judge
        self.proposes = lambda prompt, seed: f"Sum: {scripted.truth(prompt)}\n#### " + str(
            scripted.truth(prompt)
        )
        self.trained = {}
        self.proposed = {}
        self.judged = []
        monkeypatch.setattr(models, "_opened", self.opened)
        monkeypatch.setattr(correcting, "train_proposer", self.train)

    def train(self, options, spec, rows, folder, version, progress):
        asked = [row["messages"][0]["content"] for row in rows.to_pylist()]
        self.trained[folder.name] = sorted(asked)
        return SimpleNamespace(model_dir=folder)

    def opened(self, spec, head):
        name = Path(spec.path).name
        if name in self.trained:
            engine = self.scripted.Scripted(name, self.tokenizer, self.proposes)
            engine.asked = self.proposed.setdefault(name, [])
            return engine
        engine = self.scripted.Scripted("base", self.tokenizer, self.says, self.votes)
        engine.asked = self.judged
        return engine

    def run(self, recipe, until="correct"):
        build(self.workspace, recipe, "fix", quiet)
        for stage in recipe.stages:
            output, fresh = run_stage(self.workspace, recipe, stage.name, quiet)
            if stage.name == until:
                return output, fresh
        raise AssertionError(until)

    def recipe(self, **options):
        return recipe_of(self.pool, self.folder, **options)

    def added(self, output):
        rows = [output.added(bucket).to_pylist() for bucket in range(2)]
        return [row for part in rows for row in part]


def quiet(line): ...


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return with_template(tiny.make_tokenizer())


def with_template(tokenizer):
    from siftline.scoring.templates import QUESTION_ANSWER

    tokenizer.chat_template = QUESTION_ANSWER
    return tokenizer


@pytest.fixture
def lab(tiny_model, tokenizer, scripted, tmp_path, monkeypatch):
    return Lab(
        tmp_path / "root", tiny_model, tokenizer, scripted.make_world(30), scripted, monkeypatch
    )


def question(row):
    return row["messages"][0]["content"]


def right(lab, row):
    text = row["messages"][-1]["content"]
    return lab.scripted.said(text) == lab.scripted.truth(question(row))


def test_a_perfect_judge_and_proposer_restore_every_swapped_row(lab):
    gate = {"reflection": "on", "threshold": "quantile", "cut": 0.1}
    recipe = lab.recipe(stages=["duplicates", {"confidence": gate}, "correct"])
    output, fresh = lab.run(recipe)
    assert fresh
    counts = output.accounting
    table = output.table("corrections")
    assert counts.closes
    assert table.height == 30  # kept or removed, all were judged
    # Rows that were right stay as they are: their candidates come to the same end.
    clean = table.filter(~pl.col("outcome").is_in(list(ADOPTED)))
    assert clean["outcome"].to_list() == ["undecided"] * 24
    added = lab.added(output)
    assert len(added) == 6 == counts.added == sum(output.facts[name] for name in ADOPTED)
    assert {question(row) for row in added} == lab.world.swapped
    assert all(right(lab, row) for row in added)
    assert output.facts["corrected"] == counts.removed > 0
    assert output.facts["rescued"] > 0
    gone = output.all_decisions().filter(pl.col("outcome") == REMOVED)
    assert set(gone["reason"]) == {"corrected"}
    assert set(gone["matched_id"]) <= {row["id"] for row in added}
    assert gone["value"].to_list() == pytest.approx([0.95] * gone.height)
    assert (gone["threshold"] == 0.8).all()
    left = run_stage(lab.workspace, recipe, "duplicates_added", quiet)[0]
    kept = set(left.all_decisions().filter(pl.col("outcome") == KEPT)["id"])
    assert {row["id"] for row in added} <= kept


def test_a_corrected_row_names_its_parent_and_keeps_an_independent_answer_alone(lab):
    output, _ = lab.run(lab.recipe())
    table = {line["id"]: line for line in output.table("corrections").to_dicts()}
    written = {row["question"]: row["answer"] for row in lab.world.rows}
    for row in lab.added(output):
        parent = table[row["parent_id"]]
        assert parent["new_id"] == row["id"]
        assert row["id"][:20] == row["parent_id"][:20] == parent["prompt_id"]
        assert row["origin"] == f"correct fold {parent['fold']}"
        assert row["source"] == "corrected"
        assert row["answer"] == written[question(row)]


def test_explain_tells_both_ends_of_a_correction(lab):
    recipe = lab.recipe()
    output, _ = lab.run(recipe)
    done = outputs_so_far(lab.workspace, recipe)
    stories = {}
    for line in (
        output.table("corrections").filter(pl.col("outcome").is_in(list(ADOPTED))).to_dicts()
    ):
        (_, chapters), *_ = explain(lab.workspace, line["id"], [(recipe, done)])
        (_, new), *_ = explain(lab.workspace, line["new_id"], [(recipe, done)])
        stories[line["outcome"]] = [str(c) for c in chapters]
        assert (new[0].stage, new[0].outcome) == ("correct", "added")
        assert new[0].detail["parent_id"] == line["id"]
        assert chapters[-1].detail["new_id"] == line["new_id"]
    assert "removed   reason=corrected" in " ".join(stories["corrected"])
    assert "reason=low_confidence" in " ".join(stories["rescued"])
    assert "outcome=rescued" in stories["rescued"][-1]


def test_above_one_nothing_changes_and_the_table_says_what_would(lab):
    output, _ = lab.run(lab.recipe(correct={"confidence": 1.01}))
    assert output.accounting.added == output.accounting.removed == 0
    assert output.facts["outcomes"] == {"undecided": 24, "unsure": 6}
    assert output.facts["vacuous"]


@pytest.mark.parametrize("folds", [2, 3])
def test_no_prompt_is_served_by_a_model_that_saw_it(lab, folds):
    output, _ = lab.run(lab.recipe(correct={"folds": folds}))
    assert len(lab.trained) == folds
    served = []
    for name, seen in lab.trained.items():
        asked = [text.split("Question: ")[1].split("\n")[0] for text in lab.proposed[name]]
        assert asked
        assert set(asked).isdisjoint(seen)
        served += asked
    assert sorted(served) == sorted(row["question"] for row in lab.world.rows)
    assert sum(f["prompts"] for f in output.facts["folds"]) == 30
    gate = outputs_so_far(lab.workspace, lab.recipe(correct={"folds": folds}))[0][1]
    for fold in output.facts["folds"]:  # what the gate removed teaches nobody
        assert fold["trained_on"] < gate.accounting.kept


def test_one_fold_learns_from_all_that_the_gate_kept(lab):
    lab.run(lab.recipe(correct={"folds": 1}))
    gate = outputs_so_far(lab.workspace, lab.recipe(correct={"folds": 1}))[0][1]
    (seen,) = lab.trained.values()
    assert len(seen) == gate.accounting.kept == 27


def test_a_gate_that_removed_nothing_leaves_nothing_to_rescue(lab):
    output, _ = lab.run(lab.recipe(confidence={"threshold": "absolute", "cut": 0.0}))
    assert (output.facts["corrected"], output.facts["rescued"]) == (6, 0)
    assert output.accounting.removed == output.accounting.added == 6


def always(share):
    def votes(scripted):
        def said(prompt, options):
            if "Which answer is better?" not in prompt:
                return scripted.noisy_judge(prompt, options)
            return scripted.logs(share, 1 - share)

        return said

    return votes


def nonsense(scripted):
    def said(prompt, options):
        if "Which answer is better?" not in prompt:
            return scripted.noisy_judge(prompt, options)
        share = (int(digest(prompt)[:8], 16) + 1) / (16**8 + 1)
        return scripted.logs(share, 1 - share)

    return said


def silent(scripted):
    def said(prompt, options):
        if "Which answer is better?" not in prompt:
            return scripted.noisy_judge(prompt, options)
        return [float("nan")] * len(options)

    return said


@pytest.mark.parametrize(
    ("judge", "asked", "failed", "undecided"),
    [(always(0.99), 30, 0, 30), (always(0.01), 30, 0, 30), (silent, 30, 30, 0)],
    ids=["always A", "always B", "silent"],
)
def test_a_judge_of_no_use_changes_nothing_and_is_counted(lab, judge, asked, failed, undecided):
    lab.votes = judge(lab.scripted)
    output, _ = lab.run(lab.recipe())
    told = output.facts["judge"]
    assert (told["asked"], told["failed"], told["undecided"]) == (asked, failed, undecided)
    assert told["always_first"] + told["always_second"] == undecided
    assert output.accounting.added == output.accounting.removed == output.accounting.failed == 0
    assert output.accounting.closes


def test_a_judge_of_nonsense_takes_few_and_none_that_is_proven_wrong(lab):
    lab.votes = nonsense(lab.scripted)
    lab.proposes = lambda prompt, seed: "Never mind.\n#### 1"  # wrong for every question
    output, _ = lab.run(lab.recipe())
    table = output.table("corrections")
    # Both orders above 0.5 with mean above 0.8: by chance about 8 in 100.
    assert table.filter(pl.col("outcome").is_in(list(ADOPTED))).height < 9
    proven = [row["question"] for row in lab.world.rows if row["answer"] is not None]
    assert output.facts["outcomes"]["failed_check"] == len(proven) > 5
    assert not {question(row) for row in lab.added(output)} & set(proven)


def refusing(lab, wanted):
    """A judge that refuses to compare answers to some questions."""

    def votes(prompt, options):
        if "Which answer is better?" in prompt and wanted(prompt):
            raise ValueError("no log-probabilities here")
        return lab.scripted.noisy_judge(prompt, options)

    return votes


def test_a_judge_that_refuses_every_pair_stops_the_stage(lab):
    lab.votes = refusing(lab, lambda prompt: True)
    with pytest.raises(ValueError, match="the judge refused all 30 pairs, the log says why"):
        lab.run(lab.recipe())


def test_what_got_no_answer_is_tried_again_and_costs_no_other_row(lab):
    recipe, (asked, *_) = lab.recipe(), sorted(lab.world.swapped)
    lab.votes = refusing(lab, lambda prompt: asked in prompt)
    output, _ = lab.run(recipe)
    assert output.accounting.failed == 0
    assert (output.facts["judge"]["failed"], output.facts["unanswered"]) == (1, 1)
    assert output.facts["no_verdict"] == {"refused": 1}
    assert output.accounting.added == 5  # the other swapped rows
    before = len(lab.judged)
    again, fresh = lab.run(recipe)
    assert fresh
    assert again.manifest.version == output.manifest.version
    assert {asked in text for text in lab.judged[before:]} == {True}  # nobody else is asked
    lab.votes = lab.scripted.noisy_judge
    healed, fresh = lab.run(recipe)
    assert fresh
    assert (healed.facts["unanswered"], healed.accounting.added) == (0, 6)
    assert not lab.run(recipe)[1]


def test_a_candidate_that_the_engine_refused_is_tried_again(lab):
    whole, (asked, *_) = lab.proposes, sorted(lab.world.swapped)

    def refuses(prompt, seed):
        if asked in prompt:
            raise ValueError("not this one")
        return whole(prompt, seed)

    lab.proposes = refuses
    output, _ = lab.run(lab.recipe())
    assert output.facts["no_candidate"] == {"refused": 1}
    assert (output.facts["unanswered"], output.accounting.added) == (1, 5)
    lab.proposes = whole
    healed, fresh = lab.run(lab.recipe())
    assert (fresh, healed.facts["unanswered"], healed.accounting.added) == (True, 0, 6)


def test_a_fold_without_prompts_trains_on_nothing(
    tiny_model, tokenizer, scripted, tmp_path, monkeypatch
):
    world = scripted.make_world(10)
    lab = Lab(tmp_path / "root", tiny_model, tokenizer, world, scripted, monkeypatch)
    output, _ = lab.run(lab.recipe(correct={"folds": 9}))
    folds = output.facts["folds"]
    empty = [fold for fold in folds if not fold["prompts"]]
    assert empty
    assert {fold["trained_on"] for fold in empty} == {0}
    assert len(lab.trained) == len(folds) - len(empty)
    assert all(fold["trained_on"] for fold in folds if fold["prompts"])


def test_the_report_counts_pairs_judged_by_place_alone():
    judge = {"asked": 10, "failed": 1, "undecided": 9, "always_first": 3, "always_second": 1}
    facts = {"corrected": 0, "rescued": 0, "judge": judge}
    assert not any("by place" in note for note in notes(Stage("correct", "correct", None), facts))
    facts["judge"] = {**judge, "always_second": 2}
    assert "correct: the judge chose by place in 5 of 9 pairs." in notes(
        Stage("correct", "correct", None), facts
    )


def test_no_candidate_where_nothing_whole_was_said(lab):
    def proposes(prompt, seed):
        return (None, "", "It makes 1")[lab.scripted.truth(prompt) // 18 % 3]

    lab.proposes = proposes
    output, _ = lab.run(lab.recipe())
    lost = output.facts["no_candidate"]
    assert lost == {"cut": 10, "empty": 10}
    assert output.facts["outcomes"]["no_candidate"] == 20
    assert output.facts["unanswered"] == 0  # they would say the same again
    assert not lab.run(lab.recipe())[1]


def test_a_candidate_that_says_the_same_asks_no_judge(lab):
    written = {row["question"]: row["response"] for row in lab.world.rows}
    lab.proposes = lambda prompt, seed: written[
        prompt.split("Question: ")[1].split("\n")[0]
    ].upper()
    output, _ = lab.run(lab.recipe())
    assert output.facts["outcomes"] == {"same_answer": 30}
    assert not any("Which answer" in text for text in lab.judged)


def test_the_same_facts_give_the_same_bytes_and_nothing_is_asked_twice(
    lab, tiny_model, tokenizer, scripted, tmp_path, monkeypatch
):
    recipe = lab.recipe()
    output, _ = lab.run(recipe)
    asked = len(lab.judged), sum(map(len, lab.proposed.values()))
    _, fresh = lab.run(recipe)
    assert not fresh
    # Another bound reads the same candidates and verdicts.
    bolder, fresh = lab.run(lab.recipe(correct={"confidence": 0.5}))
    assert fresh
    assert (len(lab.judged), sum(map(len, lab.proposed.values()))) == asked
    assert bolder.table("corrections").equals(output.table("corrections"))
    # A fresh root, the input the other way round.
    world = type(lab.world)(lab.world.rows[::-1], lab.world.swapped)
    other = Lab(tmp_path / "other", tiny_model, tokenizer, world, scripted, monkeypatch)
    again, _ = other.run(other.recipe())
    assert again.manifest.version == output.manifest.version
    assert again.table("corrections").equals(output.table("corrections"))
    assert again.facts == output.facts


def test_a_killed_run_goes_on_where_it_was(lab):
    recipe, judge = lab.recipe(), lab.votes

    def dies(prompt, options):
        if "Which answer is better?" in prompt:
            raise RuntimeError("killed")
        return judge(prompt, options)

    lab.votes = dies
    with pytest.raises(RuntimeError, match="killed"):
        lab.run(recipe)
    proposed = sum(map(len, lab.proposed.values()))
    assert proposed == 30
    lab.votes = judge
    output, _ = lab.run(recipe)
    assert sum(map(len, lab.proposed.values())) == proposed  # candidates were facts by then
    assert output.accounting.added == 6


def test_added_rows_go_through_the_earlier_gates_but_not_through_confidence(lab):
    stages = ["duplicates", "decontamination", {"confidence": {"reflection": "on"}}, "correct"]
    recipe = recipe_of(lab.pool, lab.folder, stages=stages)
    assert [s.name for s in recipe.stages][4:] == ["duplicates_added", "decontamination_added"]
    more = recipe_of(lab.pool, lab.folder, stages=[*stages, "rejection_sampling"])
    assert [s.name for s in more.stages][7:] == [
        "duplicates_added_rejection_sampling",
        "decontamination_added_rejection_sampling",
        "confidence_added_rejection_sampling",
    ]


def test_confidence_for_later_rows_leaves_corrected_ones_alone(lab):
    from siftline.stages.confidence.run import _judged

    output, _ = lab.run(lab.recipe())
    recipe = lab.recipe()
    done = outputs_so_far(lab.workspace, recipe)
    gate = done[0][0]
    context = SimpleNamespace(
        before=done, judged=lambda bucket: {"sampled", *ids_added(output, bucket)}, stage=gate
    )
    assert [_judged(context, bucket) for bucket in range(2)] == [{"sampled"}, {"sampled"}]


def ids_added(output, bucket):
    return output.added(bucket).column("id").to_pylist()


# ---- with models that are trained ------------------------------------------------------------


def test_real_models_are_trained_once_and_decide_alike(tiny, scripted, tmp_path):
    folder = tiny.make_model(tmp_path / "base", seed=4)
    world = scripted.make_world(10)
    found = []
    for place in ("one", "two"):
        root = tmp_path / place
        recipe = recipe_of(
            world.write(root / "in"),
            folder,
            confidence={"samples": 2, "max_new_tokens": 4},
            correct={
                "max_new_tokens": 4,
                "confidence": 0.5,
                "training": {"epochs": 1, "learning_rate": 1e-3, "batch_rows": 8},
            },
        )
        workspace = Workspace(root)
        if place == "two":  # only the models: they are found, not trained
            shutil.copytree(tmp_path / "one" / "models", root / "models")
            before = stamps(root / "models")
        build(workspace, recipe, "fix", quiet)
        for stage in recipe.stages[:2]:
            output, _ = run_stage(workspace, recipe, stage.name, quiet)
        assert output.accounting.closes
        found.append((output.manifest.version, output.table("corrections"), output.facts))
        assert len(list((root / "models").glob("correct-*/model.safetensors"))) == 2
    assert stamps(root / "models") == before
    assert found[0][0] == found[1][0]
    assert found[0][1].equals(found[1][1])
    assert found[0][2] == found[1][2]
    assert found[0][1].height == 10


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
