"""A model as judge of two answers: both orders, no side, every way of not answering."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.pairwise import MALFORMED, prefer, verdict_against_reference
from siftline.scoring.recorder import REFUSED, Recorder
from siftline.scoring.verifiers import Verdict

ASKED = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "x"}]
RIGHT, WRONG = "It is 7.\n#### 7", "It is 8.\n#### 8"


@pytest.fixture
def judge(scripted, tokenizer, tmp_path):
    """`judge(votes, name)` is a recorder on a scripted judge."""

    def made(votes, name="judge"):
        engine = scripted.Scripted(name, tokenizer, votes=votes)
        return Recorder(engine, ModelSpec("nowhere", max_length=2048), tmp_path / "store")

    return made


def one(recorder, original=WRONG, candidate=RIGHT):
    return prefer(recorder, 0, {"a": (ASKED, original, candidate)})["a"]


def test_the_better_answer_wins_wherever_it_stands(judge, scripted):
    recorder = judge(lambda prompt, options: scripted.perfect_pairs(prompt))
    found = one(recorder)
    assert (found.verdict, found.reason) == ("candidate", None)
    assert found.confidence == pytest.approx(0.95)
    assert (found.as_second, found.as_first) == pytest.approx((0.95, 0.95))
    turned = one(recorder, RIGHT, WRONG)
    assert turned.verdict == "original"
    assert turned.confidence == pytest.approx(0.95)
    assert (turned.as_second, turned.as_first) == pytest.approx((0.05, 0.05))
    # Each pair was asked in both orders, and the turned pair is the same two questions.
    assert len(recorder.engine.asked) == 2
    first, second = recorder.engine.asked
    assert first.index("#### 7") > first.index("#### 8")
    assert second.index("#### 7") < second.index("#### 8")


def test_the_confidence_is_the_mean_of_both_orders(judge, scripted):
    def votes(prompt, options):
        return scripted.logs(*((0.3, 0.7) if prompt.index("#### 7") > 60 else (0.9, 0.1)))

    found = one(judge(votes))
    assert sorted([found.as_second, found.as_first]) == pytest.approx([0.7, 0.9])
    assert found.confidence == pytest.approx(0.8)


@pytest.mark.parametrize("share", [0.999, 0.001, 0.5])
def test_a_judge_that_holds_to_a_place_gives_no_verdict(judge, scripted, share):
    found = one(judge(lambda prompt, options: scripted.logs(share, 1 - share)))
    assert (found.verdict, found.confidence, found.reason) == (None, None, None)
    assert found.as_second + found.as_first == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ([float("nan"), 0.0], "no_scores"),
        ([float("inf"), 0.0], "no_scores"),
        ([-1.0, -2.0, -3.0], MALFORMED),
        ([-1.0], MALFORMED),
    ],
)
def test_a_malformed_reply_is_a_reason(judge, reply, reason):
    recorder = judge(lambda prompt, options: reply)
    found = prefer(recorder, 0, {i: (ASKED, WRONG, f"#### {i}") for i in "123"})
    assert {p.reason for p in found.values()} == {reason}
    assert {p.verdict for p in found.values()} == {None}
    told = verdict_against_reference(recorder, 0, {"a": (ASKED, RIGHT, "7")})["a"]
    assert told == Verdict(None, "7", f"verifier_error: {reason}")


def picky(scripted, batch_tokens, root, tokenizer):
    """A judge that refuses any call in which one of the answers is forbidden."""
    from dataclasses import replace

    def votes(prompt, options):
        if "forbidden" in prompt:
            raise ValueError("no such answer")
        return scripted.perfect_pairs(prompt)

    engine = scripted.Scripted("picky", tokenizer, votes=votes)
    spec = replace(ModelSpec("nowhere", max_length=2048), batch_tokens=batch_tokens)
    return Recorder(engine, spec, root)


@pytest.mark.parametrize("batch_tokens", [64, 300, 100_000])
def test_one_refused_pair_costs_no_other_its_verdict(scripted, tokenizer, tmp_path, batch_tokens):
    # With small batches a batch holds the refused pair alone, and the engine refuses all of it.
    pairs = {str(i): (ASKED, f"It is {20 + i}.\n#### {20 + i}", RIGHT) for i in range(9)}
    pairs["4"] = (ASKED, "forbidden\n#### 8", RIGHT)
    found = prefer(picky(scripted, batch_tokens, tmp_path / "store", tokenizer), 0, pairs)
    assert {i for i, told in found.items() if told.reason == REFUSED} == {"4"}
    assert {told.verdict for i, told in found.items() if i != "4"} == {"candidate"}
    held = {i: (ASKED, RIGHT, answer) for i, (_, answer, _) in pairs.items()}
    recorder = picky(scripted, batch_tokens, tmp_path / "other", tokenizer)
    recorder.engine.votes = lambda prompt, options: refusing(scripted, prompt, options)
    told = verdict_against_reference(recorder, 0, held)
    assert {i for i, line in told.items() if line.reason.endswith(REFUSED)} == {"4"}


def refusing(scripted, prompt, options):
    if "forbidden" in prompt:
        raise ValueError("no such answer")
    return same(scripted)(prompt, options)


def test_a_judge_that_refuses_everything_or_answers_too_little_stops_no_bucket(judge):
    def refuses(prompt, options):
        raise ValueError("no log-probabilities")

    pairs = {i: (ASKED, WRONG, f"#### {i}") for i in "123"}
    found = prefer(judge(refuses), 0, pairs)
    assert {p.reason for p in found.values()} == {REFUSED}
    short = judge(lambda prompt, options: [-1.0, -1.0], "short")
    whole = short.engine.choices
    short.engine.choices = lambda prompts, options: whole(prompts, options)[:-1]
    assert {p.reason for p in prefer(short, 0, pairs).values()} == {REFUSED}


def test_one_pair_too_long_is_alone_with_its_reason(judge, scripted):
    recorder = judge(lambda prompt, options: scripted.perfect_pairs(prompt))
    found = prefer(recorder, 0, {"a": (ASKED, WRONG, RIGHT), "b": (ASKED, "y" * 3000, RIGHT)})
    assert found["a"].verdict == "candidate"
    assert (found["b"].verdict, found["b"].reason) == (None, "too_long")


def test_verdicts_are_facts_and_texts_are_not_looked_into(judge, scripted):
    recorder = judge(lambda prompt, options: scripted.perfect_pairs(prompt))
    braces = "{prompt} {first} {0} #### 7"
    first = one(recorder, WRONG, braces)
    asked = len(recorder.engine.asked)
    assert braces in recorder.engine.asked[0]
    assert one(recorder, WRONG, braces) == first
    assert len(recorder.engine.asked) == asked
    assert prefer(recorder, 0, {}) == {}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 10**6))
def test_swapping_the_answers_swaps_the_verdict(judge, seed):
    def votes(prompt, options):
        g = np.random.default_rng([seed, prompt.index("alpha") < prompt.index("beta")])
        return g.normal(size=2).tolist()

    recorder = judge(votes, f"judge {seed}")
    there = one(recorder, "alpha", "beta")
    back = one(recorder, "beta", "alpha")
    other = {"candidate": "original", "original": "candidate", None: None}
    assert back.verdict == other[there.verdict]
    assert (back.confidence is None) == (there.confidence is None)
    if there.confidence is not None:
        assert back.confidence == pytest.approx(there.confidence)


# ---- against a reference ---------------------------------------------------------------------


def same(scripted):
    def votes(prompt, options):
        first, second = prompt.split("Answer 1:")[1].split("Answer 2:")
        values = [scripted.said(text) or text.split("\n")[0].strip() for text in (first, second)]
        return scripted.logs(0.9, 0.1) if values[0] == values[1] else scripted.logs(0.1, 0.9)

    return votes


def test_a_model_holds_a_response_against_a_reference(judge, scripted):
    asked = {
        "right": (ASKED, RIGHT, "#### 7"),
        "wrong": (ASKED, WRONG, "#### 7"),
        "prose": (ASKED, "seven", "seven"),
        "empty": (ASKED, "  ", "#### 7"),
        "open": (ASKED, RIGHT, " "),
    }
    recorder = judge(same(scripted))
    found = verdict_against_reference(recorder, 0, asked)
    assert found == {
        "right": Verdict(True, "7", "match"),
        "wrong": Verdict(False, "8", "wrong_answer"),
        "prose": Verdict(True, None, "match"),
        "empty": Verdict(None, None, "no_final_answer"),
        "open": Verdict(None, "7", "no_reference"),
    }
    assert len(recorder.engine.asked) == 5  # both orders; equal texts are one question


def test_a_verdict_on_a_reference_needs_both_orders(judge, scripted):
    def votes(prompt, options):
        share = 0.9 if prompt.index("#### 7") < prompt.index("#### 8") else 0.2
        return scripted.logs(share, 1 - share)

    told = verdict_against_reference(judge(votes), 0, {"a": (ASKED, RIGHT, "#### 8")})["a"]
    assert told == Verdict(None, "7", "verifier_error: the orders disagree")
