"""The stage's spending: limits that hold, targets met exactly, what is refused and why."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from siftline.kernels.draws import hash64
from siftline.rows.schema import make_row, message
from siftline.scoring.engines.base import Failed, Generation, ModelSpec
from siftline.scoring.recorder import REFUSED, Recorder
from siftline.scoring.verifiers import Verdict
from siftline.stages.rejection_sampling import run as sampling
from siftline.stages.rejection_sampling import sampler as sampler_stage
from siftline.stages.rejection_sampling.difficulty import accept, tally
from siftline.stages.rejection_sampling.drawing import Made, Prompt, run_campaign
from siftline.stages.rejection_sampling.options import RejectionSampling
from siftline.stages.rejection_sampling.problems import Problem, by_verifier, grader, negatives
from siftline.stages.rejection_sampling.sampler import SILENCE, Sampler
from siftline.stages.rejection_sampling.trials import Rule

RATES = {"ten": 0.9, "half": 0.5, "rare": 0.15, "never": 0.0, "always": 1.0}


def problem(name, place):
    said = [message("user", f"What is {name}?"), message("assistant", "#### 1")]
    row = make_row(said, answer="1")
    return Problem(Prompt(int(row["prompt_id"][0], 16), [place + 1, 9]), row)


PROBLEMS = {p.parent["prompt_id"]: p for p in map(problem, RATES, range(len(RATES)))}
RATE = dict(zip([tuple(p.home.tokens) for p in PROBLEMS.values()], RATES.values(), strict=True))
NAMES = dict(zip(PROBLEMS, RATES, strict=True))


def said(tokens, seed):
    """Right by the prompt's rate; a third of the answers are in the same words."""
    rate = RATE[tuple(tokens)]
    luck = hash64(1, str(tokens), seed) / 2**63
    words = f"as counted {seed % 97}" if seed % 3 else "plainly"
    length = 3 + seed % 5
    return Generation(f"It is so, {words}.\n#### {1 if luck < rate else 2}", length, "stop")


class Engine:
    """Answers whole batches; `Streams` takes draws one by one."""

    def __init__(self, name="fake"):
        self.name, self.drawn, self.tokens = name, 0, 0

    def fingerprint(self):
        return self.name

    def generate(self, prompts, seeds, how):
        pairs = zip(prompts, seeds, strict=True)
        return [[self.draw(p, s) for s in own] for p, own in pairs]

    def draw(self, tokens, seed):
        text = said(tokens, seed)
        self.drawn += 1
        self.tokens += text.n_tokens
        return text


class Streams(Engine):
    slots = 3

    def stream(self, pull, how):
        flying = []
        while True:
            flying += pull(self.slots - len(flying), not flying)
            if not flying:
                return
            name, tokens, seed = flying.pop()
            yield name, self.draw(tokens, seed)


def made(engine, root, **options):
    """Pilot, targets and the rest, as the stage does it."""
    chosen = RejectionSampling(target="uniform", max_new_tokens=8, **options)
    recorder = Recorder(engine, ModelSpec(path="x"), root)
    grade = by_verifier(chosen.verifier)
    sampler = Sampler.of(chosen, PROBLEMS, [recorder], lambda line: None, grade)
    sampler.pilot()
    campaign = sampling._campaign(SimpleNamespace(), chosen, sampler, None)
    sampler.finish(campaign)
    return sampler, campaign, sampler.judged(campaign)


def standing(campaign):
    return {NAMES[p]: (t.used, t.status) for p, t in campaign.trials.items()}


def test_targets_are_met_exactly_and_the_rest_is_named(tmp_path):
    _, campaign, judged = made(Engine(), tmp_path, k=3, cap=40)
    ends = {name: status for name, (_, status) in standing(campaign).items()}
    assert ends == {
        "ten": "met", "half": "met", "rare": "met", "never": "unsolved", "always": "met",
    }  # fmt: skip
    taken = accept(judged.draws, judged.targets).filter("accepted")
    counts = {NAMES[p]: n for p, n in taken.group_by("prompt_id").len().iter_rows()}
    assert counts == {"ten": 3, "half": 3, "rare": 3, "always": 3}
    texts = taken.join(judged.draws, on=["prompt_id", "draw"])
    assert not texts.select("prompt_id", "dedup_key").is_duplicated().any()
    used = sum(n for n, _ in standing(campaign).values())
    assert judged.draws.height == used


def test_without_a_verifier_each_prompt_gets_its_answers_whatever_they_say(tmp_path):
    """The one that is never right too; and no pass rate is claimed."""
    sampler, campaign, judged = made(Engine(), tmp_path, k=3, cap=40, verifier="none")
    taken = accept(judged.draws, judged.targets).filter("accepted")
    counts = {NAMES[p]: n for p, n in taken.group_by("prompt_id").len().iter_rows()}
    assert counts == dict.fromkeys(NAMES.values(), 3)
    assert set(judged.draws["reason"]) == {"unverified"}
    table = sampling._table(sampler, campaign, judged, None)
    assert table["difficulty"].null_count() == table["sampler_difficulty"].null_count() == 5
    assert set(table["status"]) == {"met"}
    checked = made(Engine(), tmp_path, k=3, cap=40)[2]
    held = judged.draws.join(checked.draws, on=["prompt_id", "draw"])
    assert held.height > 0
    assert (held["text"] == held["text_right"]).all()  # the same draws, one way or the other


def test_prompts_without_an_answer_are_drawn_for_only_where_nothing_is_verified(
    tiny_model, tmp_path
):
    from siftline.rows import schema
    from siftline.scoring.templates import load_tokenizer
    from siftline.stages.rejection_sampling.problems import added_rows, problems_of

    def row(question, answer, kind):
        turns = [schema.message("user", question), schema.message("assistant", "It is 7.")]
        return schema.make_row(turns, answer=answer, answer_from=kind)

    lines = [row("a", "7", "independent"), row("b", None, None), row("c", "7", "response")]
    table = pa.Table.from_pylist(sorted(lines, key=lambda r: r["id"]), schema=schema.ROW)
    engine = SimpleNamespace(
        tokenizer=load_tokenizer(ModelSpec(path=str(tiny_model))), max_length=200,
        fingerprint=lambda: "x",
    )  # fmt: skip
    model = Recorder(engine, ModelSpec(path="x", max_length=200), tmp_path)
    found, skipped = problems_of(model, [(0, table)], "math")
    assert (len(found), skipped["no_independent_answer"]) == (1, 2)
    found, skipped = problems_of(model, [(0, table)], "none")
    assert (len(found), sum(skipped.values())) == (3, 0)
    draws = pl.DataFrame({"prompt_id": sorted(found), "draw": 0, "text": "Seven, I guess."})
    taken = draws.select("prompt_id", "draw", accepted=pl.lit(True))
    made_ = {r["parent_id"]: r["answer"] for r in added_rows(found, draws, taken)}
    assert [made_[r["id"]] for r in lines] == ["7", None, None]
    with pytest.raises(ValueError, match="measures no difficulty"):
        RejectionSampling(verifier="none")


@pytest.mark.parametrize("limit", [21, 30, 1000])
def test_draws_never_pass_their_limit_and_both_kinds_of_engine_agree(tmp_path, limit):
    seen = []
    for kind in (Engine, Streams):
        engine = kind()
        _, campaign, judged = made(engine, tmp_path / kind.__name__, k=3, cap=40, max_draws=limit)
        assert engine.drawn <= limit
        assert engine.drawn == judged.draws.height  # a limited run wastes nothing
        seen.append((standing(campaign), judged.draws))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1].equals(seen[1][1])
    ends = {status for _, status in seen[0][0].values()}
    assert ("out_of_budget" in ends) == (limit < 1000)


def test_the_answers_of_a_prompt_that_was_given_up_stay(tmp_path):
    sampler, campaign, judged = made(Streams(), tmp_path, k=4, cap=12)
    table = sampling._table(sampler, campaign, judged, None)
    tried = table.filter((pl.col("status") == "unsolved") & (pl.col("n_correct") > 0))
    assert tried.height
    assert tried.select(pl.col("difficulty").is_between(0, 1, closed="none").all()).item()
    assert tried["n_trials"].max() < 12
    taken = accept(judged.draws, judged.targets).filter("accepted")
    kept = dict(taken.group_by("prompt_id").len().iter_rows())
    assert {p: kept[p] for p in tried["prompt_id"]} == dict(
        tried.select("prompt_id", "n_distinct").iter_rows()
    )
    assert sampling._facts(judged, campaign, sampler.preview(campaign), "math")["correct"] > 0


class Dying(Streams):
    """Ends its process after so many draws."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def draw(self, tokens, seed):
        if self.drawn >= self.after:
            raise RuntimeError("the engine died")
        return super().draw(tokens, seed)


@pytest.mark.parametrize(("options", "after"), [({"max_draws": 30}, 23), ({"max_tokens": 140}, 5)])
def test_a_limited_run_that_was_killed_ends_as_one_that_was_not(tmp_path, options, after):
    options = {"k": 3, "cap": 40, **options}
    whole = made(Streams(), tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="the engine died"):
        made(Dying(after), tmp_path / "killed", **options)
    engine = Streams()
    again = made(engine, tmp_path / "killed", **options)
    assert standing(again[1]) == standing(whole[1])
    assert again[2].draws.equals(whole[2].draws)
    assert engine.drawn == whole[2].draws.height - after


def test_a_limited_stream_runs_once(tmp_path, monkeypatch):
    """No turns: the pilot and the rest are one stream each."""
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return run_campaign(*args, **options)

    monkeypatch.setattr(sampler_stage, "run_campaign", counted)
    _, campaign, _ = made(Streams(), tmp_path, k=3, cap=40, max_draws=30)
    assert "out_of_budget" in {status for _, status in standing(campaign).values()}
    assert len(calls) == 2


@pytest.mark.parametrize("limit", [110, 140, 10_000])
def test_tokens_never_pass_their_limit(tmp_path, limit):
    for kind in (Engine, Streams):
        engine = kind()
        _, campaign, judged = made(engine, tmp_path / kind.__name__, k=3, cap=40, max_tokens=limit)
        spent = judged.draws["n_tokens"].sum()
        assert spent == engine.tokens <= limit
        stopped = "out_of_budget" in {status for _, status in standing(campaign).values()}
        assert stopped == (limit < 10_000)
        assert not stopped or limit - spent < 8  # another draw might not have fitted


def test_a_budget_that_ends_in_the_pilot_says_so_and_keeps_the_draws(tmp_path):
    engine = Engine()
    with pytest.raises(ValueError, match=r"leaves 19 draws and the pilot of 5 prompts takes 20"):
        made(engine, tmp_path, max_draws=19)
    assert engine.drawn == 0
    with pytest.raises(ValueError, match=r"max_tokens ended the pilot with [1-5] of 5 prompts"):
        made(engine, tmp_path, max_tokens=40)
    assert 0 < engine.drawn < 20
    again = Engine()
    made(again, tmp_path, k=1, cap=4)
    assert again.drawn == 20 - engine.drawn


def test_a_second_run_draws_nothing_and_decides_the_same(tmp_path):
    first = made(Engine(), tmp_path, k=3, cap=40)
    engine = Engine()
    second = made(engine, tmp_path, k=3, cap=40)
    assert engine.drawn == 0
    assert first[2].draws.equals(second[2].draws)


def test_vanilla_takes_all_that_k_draws_give(tmp_path):
    chosen = RejectionSampling(target="vanilla", k=6, max_new_tokens=8)
    recorder = Recorder(Engine(), ModelSpec(path="x"), tmp_path)
    sampler = Sampler.of(chosen, PROBLEMS, [recorder], lambda line: None, by_verifier("math"))
    sampler.pilot()
    campaign = sampling._campaign(SimpleNamespace(), chosen, sampler, None)
    sampler.finish(campaign)
    assert {used for used, _ in standing(campaign).values()} == {6}


def test_targets_from_scores_are_the_best_rows_rounded_and_never_above_k(tmp_path, monkeypatch):
    scores = dict(zip(PROBLEMS, (2.6, 0.2, 99.0, -1.0, None), strict=True))
    rows = [(PROBLEMS[p].parent["id"], v) for p, v in scores.items() if v is not None]
    frame = pl.DataFrame(rows, schema={"id": pl.String, "value": pl.Float64}, orient="row")
    monkeypatch.setattr(sampling, "quality", lambda context, name: frame)
    chosen = RejectionSampling(target="scores", target_scores="hard", k=4)
    rates = pl.DataFrame({"prompt_id": list(PROBLEMS)})
    found = sampling._targets(SimpleNamespace(), chosen, rates)
    assert [found[p] for p in PROBLEMS] == [3, 0, 4, 0, 0]
    with pytest.raises(ValueError, match="needs target_scores"):
        RejectionSampling(target="scores")


def test_a_second_model_sets_the_targets_out_of_the_same_budget(tmp_path):
    chosen = RejectionSampling(max_new_tokens=8, k=4, max_draws=60)
    sampler, judge = (Engine("a"), Engine("b"))
    grade = by_verifier("math")
    other = Sampler.of(
        chosen, PROBLEMS, [Recorder(judge, ModelSpec(path="y"), tmp_path)], print, grade
    )
    other.pilot()
    first = Sampler.of(
        chosen,
        PROBLEMS,
        [Recorder(sampler, ModelSpec(path="x"), tmp_path)],
        print,
        grade,
        other.limits,
    )
    first.pilot()
    rates = tally(other.judged().draws)
    campaign = sampling._campaign(SimpleNamespace(), chosen, first, rates)
    assert first.preview(campaign).limit == 20
    first.finish(campaign)
    assert sampler.drawn + judge.drawn <= 60
    assert judge.drawn == 20
    table = sampling._table(first, campaign, first.judged(campaign), rates)
    agreement = sampling._agreement(table)
    assert agreement["prompts"] == 5
    # The fake draws of both are the same, but the sampler went on after the pilot.
    assert 0.8 < agreement["correlation"] <= 1


def test_a_prompt_that_one_model_refuses_has_no_trial_and_is_listed(tmp_path):
    gone = next(iter(PROBLEMS))

    class Refusing(Engine):
        def generate(self, prompts, seeds, how):
            if any(list(p) == list(PROBLEMS[gone].home.tokens) for p in prompts):
                raise ValueError("too long for this engine")
            return super().generate(prompts, seeds, how)

    chosen = RejectionSampling(max_new_tokens=8, k=2, cap=8)
    recorder = Recorder(Refusing(), ModelSpec(path="x"), tmp_path)
    same_bucket = {
        p: replace(problem, home=Prompt(0, problem.home.tokens)) for p, problem in PROBLEMS.items()
    }
    sampler = Sampler.of(chosen, same_bucket, [recorder], print, by_verifier("math"))
    sampler.pilot()
    rates = pl.DataFrame(
        {"prompt_id": list(PROBLEMS), "n_trials": 4, "n_correct": 2, "n_distinct": 2}
    )
    campaign = sampling._campaign(SimpleNamespace(), chosen, sampler, rates)
    assert gone not in campaign.trials
    assert sampler.preview(campaign).draws.mean >= 0
    sampler.finish(campaign)
    table = sampling._table(sampler, campaign, sampler.judged(campaign), rates)
    assert table.height == 5
    (line,) = table.filter(pl.col("prompt_id") == gone).to_dicts()
    assert (line["status"], line["n_trials"], line["sampler_difficulty"]) == ("failed", 0, None)


class Refusing(Streams):
    """Takes many draws at a time, and refuses the second one of one prompt so many times."""

    slots = 64

    def __init__(self, times):
        super().__init__()
        self.times = times

    def stream(self, pull, how):
        for name, text in super().stream(pull, how):
            if self.times and NAMES[name[0]] == "half" and name[1] == 1:
                self.times -= 1
                yield name, Failed(REFUSED)
            else:
                yield name, text


def test_a_draw_that_is_refused_among_others_ends(tmp_path, monkeypatch):
    rounds = []

    def counted(*args, **options):
        rounds.append(1)
        assert len(rounds) < 9
        return run_campaign(*args, **options)

    monkeypatch.setattr(sampler_stage, "run_campaign", counted)
    options = {"k": 3, "pilot": 4, "cap": 24}
    _, plain, _ = made(Streams(), tmp_path / "plain", **options)
    _, once, _ = made(Refusing(1), tmp_path / "once", **options)
    assert standing(once) == standing(plain)
    rounds.clear()
    engine = Refusing(9)
    sampler, always, _ = made(engine, tmp_path / "always", **options, max_draws=500)
    stands = standing(always)
    assert stands.pop("half") == (1, "failed")
    assert stands == {k: v for k, v in standing(plain).items() if k != "half"}
    assert sampler.limits.draws == 500 - len(sampler.lines)


def test_a_campaign_that_neither_draws_nor_ends_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_stage, "run_campaign", lambda *args, **options: Made())
    with pytest.raises(RuntimeError, match="5 prompts are open"):
        made(Streams(), tmp_path, k=3, pilot=2, cap=9)


def silent_from(first):
    """A grader that fails on every draw from a number on."""
    told = by_verifier("math")
    seen = []

    def grade(draws):
        seen.extend(draws)
        dead = Verdict(None, None, "verifier_error: timeout")
        return told(draws) if len(seen) <= first else [dead] * len(draws)

    return grade


@pytest.mark.parametrize(("engine", "draws"), [(Engine, 10), (Streams, 10)])
def test_a_verifier_that_never_answers_ends_the_pilot(tmp_path, engine, draws):
    chosen = RejectionSampling(target="uniform", pilot=2, screen=False)
    recorder = Recorder(engine(), ModelSpec(path="x"), tmp_path)
    sampler = Sampler.of(chosen, PROBLEMS, [recorder], lambda line: None, silent_from(0))
    with pytest.raises(RuntimeError, match=f"no verdict on any of {draws} draws, first: timeout"):
        sampler.pilot()
    longer = replace(chosen, pilot=24)
    sampler = Sampler.of(longer, PROBLEMS, [recorder], lambda line: None, silent_from(0))
    with pytest.raises(RuntimeError, match="no verdict on any of"):
        sampler.pilot()
    assert SILENCE <= len(sampler.lines) < 24 * 5
    # One that fails later ends nothing, and what it failed on is counted.
    recorder = Recorder(engine(), ModelSpec(path="x"), tmp_path / "b")
    sampler = Sampler.of(chosen, PROBLEMS, [recorder], lambda line: None, silent_from(9))
    sampler.pilot()
    judged = sampler.judged()
    assert 0 < judged.draws["error"].drop_nulls().len() < 10
    assert set(judged.draws["error"].drop_nulls()) == {"timeout"}
    assert set(judged.draws.filter(pl.col("error").is_not_null())["reason"]) == {"verifier_error"}


def test_what_a_verifier_outside_did_not_answer_is_asked_again(tmp_path):
    recorder = Recorder(Streams(), ModelSpec(path="x"), tmp_path)
    chosen = RejectionSampling(target="uniform", pilot=2)
    sampler = Sampler.of(chosen, PROBLEMS, [recorder], lambda line: None, silent_from(9))
    sampler.pilot()
    campaign = sampling._campaign(SimpleNamespace(), chosen, sampler, None)
    before = sampler.preview(campaign)
    for verifier, again in (("judge", True), ("mine:check", True), ("math", False)):
        facts = sampling._facts(sampler.judged(), campaign, before, verifier)
        assert facts["verifier_errors"] == facts["refused"]["verifier_error"] > 0
        assert bool(facts["unanswered"]) == again


def test_cut_and_stuck_draws_are_refused_unless_told_not_to(tmp_path):
    texts = {
        0: Generation("so " * 80 + "\n#### 1", 8, "stop"),
        1: Generation("#### 1", 8, "length"),
        2: Generation("It is one.\n#### 1", 8, "stop"),
        3: Generation("It is two.\n#### 2", 8, "stop"),
    }

    class Scripted(Engine):
        def generate(self, prompts, seeds, how):
            order = sorted(s for own in seeds for s in own)
            return [[texts[order.index(s) % 4] for s in own] for own in seeds]

    one = dict(list(PROBLEMS.items())[:1])
    found = {}
    for screen in (True, False):
        chosen = RejectionSampling(max_new_tokens=8, screen=screen)
        recorder = Recorder(Scripted(str(screen)), ModelSpec(path="x"), tmp_path)
        sampler = Sampler.of(chosen, one, [recorder], lambda line: None, by_verifier("math"))
        sampler.pilot()
        lines = sampler.judged().draws
        found[screen] = sorted(lines.select("reason", "correct").rows())
        assert negatives(sampler.judged(), 4)["text"].to_list() == ["It is two.\n#### 2"]
    assert found[True] == [
        ("match", True), ("repetitive", False), ("truncated", False), ("wrong_answer", False),
    ]  # fmt: skip
    assert found[False].count(("match", True)) == 2


def test_negatives_are_distinct_and_at_most_so_many(tmp_path):
    _, _, judged = made(Engine(), tmp_path, k=3, cap=40)
    few = negatives(judged, 2)
    assert few.group_by("prompt_id").len()["len"].max() == 2
    every = negatives(judged, 99)
    assert not every.select("prompt_id", "text").is_duplicated().any()
    refuted = judged.draws.filter("refuted")
    assert every.height == refuted.select("prompt_id", "dedup_key").unique().height
    assert negatives(judged, 0).is_empty()


def test_options_that_cannot_be_meant_are_refused():
    good = RejectionSampling()
    for change, match in (
        ({"pilot": 65}, "pilot 65 is above cap 64"),
        ({"unsolved_cap": 65}, "unsolved_cap 65 is above cap 64"),
        ({"max_draws": 0}, "max_draws is 0"),
        ({"max_similarity": 0.0}, "max_similarity is 0.0"),
        ({"negatives": -1}, "negatives is -1"),
        ({"target_scores": "x"}, "other targets take none"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(good, **change)


def test_a_rule_is_what_the_options_say(tmp_path):
    sampler, campaign, _ = made(Engine(), tmp_path, k=2, cap=30, max_similarity=0.7)
    rule = next(iter(campaign.trials.values())).rule
    assert isinstance(rule, Rule)
    assert (rule.cap, rule.pilot, rule.max_similarity) == (30, 4, 0.7)
    assert 0 < rule.prior.mean() < 1
    assert sampler.preview(campaign).prompts == 0


def test_a_judge_verifies_in_both_orders_and_its_place_bias_keeps_nothing(tmp_path, tiny_model):
    """Scripted replies: says yes to equal answers, or always A; draws it leaves open are lost."""

    class Judge:
        max_length = 2000

        def __init__(self, biased):
            from siftline.scoring.templates import load_tokenizer

            self.tokenizer = load_tokenizer(ModelSpec(path=str(tiny_model)))
            self.biased = biased

        def fingerprint(self):
            return f"judge {self.biased}"

        def choices(self, prompts, options):
            replies = []
            for tokens in prompts:
                text = self.tokenizer.decode(tokens)
                pair = text.split("Answer 1: ")[1].split("Answer 2: ")
                wrong = ["#### 2" in part for part in pair]
                same = not wrong[0] if self.biased else wrong[0] == wrong[1]
                replies.append([-0.1, -3.0] if same else [-3.0, -0.1])
            return np.array(replies, np.float32)

    shares = {}
    for biased in (False, True):
        spec = ModelSpec(path="j", max_length=2000)
        chosen = RejectionSampling(max_new_tokens=8, verifier="judge")
        recorder = Recorder(Engine(), ModelSpec(path="x"), tmp_path)
        sampler = Sampler.of(
            chosen,
            PROBLEMS,
            [recorder],
            lambda line: None,
            grader("judge", partial(Recorder, Judge(biased), spec, tmp_path)),
        )
        sampler.pilot()
        lines = sampler.judged().draws
        shares[biased] = {
            NAMES[p]: c for p, c in lines.group_by("prompt_id").agg(pl.col("correct").sum()).rows()
        }
        reasons = set(lines["reason"])
        assert reasons == ({"match", "verifier_error"} if biased else {"match", "wrong_answer"})
        assert not biased or not lines["refuted"].any()
    assert shares[False]["always"] == shares[True]["always"] == 4
    assert shares[False]["never"] == shares[True]["never"] == 0
    assert chosen.more_roles == ("target", "judge")
