"""Accuracy tables from a scripted engine, and summaries against hand-computed numbers."""

from dataclasses import dataclass, field

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from siftline.scoring.engines.base import Generation
from siftline.scoring.verifiers import Verdict
from siftline.training.evaluate import (
    RESULT,
    Evaluation,
    at_floor,
    compare,
    evaluate,
    summarise_accuracy,
    summarise_seeds,
)
from siftline.training.intervals import Interval, paired_difference, wilson


@dataclass
class ScriptedEngine:
    """Answers "n+n?" with 2n, except where n is in `wrong`; records what it is asked."""

    tokenizer: object
    wrong: frozenset[int] = frozenset()
    max_length: int = 100
    calls: list = field(default_factory=list)

    def generate(self, prompts, seeds, sampling):
        self.calls.append((prompts, seeds, sampling))
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        numbers = [int(t.removeprefix("Question: ").partition("+")[0]) for t in texts]
        assert all(text.endswith("?\nAnswer:") for text in texts)
        return [[Generation(f" {2 * n + (n in self.wrong)}", 3, "stop")] for n in numbers]


def verify(response, answer):
    if response.strip() == "14":
        return Verdict(None, None, "no_final_answer")
    same = response.strip() == answer
    return Verdict(same, response.strip(), "match" if same else "wrong_answer")


def questions(n=10):
    return pl.DataFrame(
        {
            "id": [f"{i:040x}" for i in range(n)],
            "messages": [
                [
                    {"role": "user", "content": f"{i}+{i}?"},
                    {"role": "assistant", "content": "the solution must not be shown"},
                ]
                for i in range(n)
            ],
            "answer": [str(2 * i) for i in range(n)],
            "level": [1 if i < 4 else 10 for i in range(n)],
        }
    )


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.make_tokenizer()


def test_each_question_is_asked_once_without_its_solution(tokenizer):
    engine = ScriptedEngine(tokenizer, wrong=frozenset({2, 5}))
    told = []
    results = evaluate(
        engine,
        questions(),
        verify,
        Evaluation(max_new_tokens=8, batch_rows=3),
        lambda done, total: told.append((done, total)),
    )
    assert dict(results.schema) == RESULT
    wrong = results.filter(~pl.col("correct"))
    assert wrong.select("id", "reason").rows() == [
        (f"{2:040x}", "wrong_answer"),
        (f"{5:040x}", "wrong_answer"),
        (f"{7:040x}", "no_final_answer"),  # undecided is not correct
    ]
    assert [len(prompts) for prompts, _, _ in engine.calls] == [3, 3, 3, 1]
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    sampling = engine.calls[0][2]
    assert (sampling.max_new_tokens, sampling.temperature) == (8, 0.0)


def test_shuffled_questions_give_the_same_frame_from_the_same_batches(tokenizer):
    first, second = ScriptedEngine(tokenizer), ScriptedEngine(tokenizer)
    config = Evaluation(max_new_tokens=8, batch_rows=4, temperature=0.7, seed=3)
    straight = evaluate(first, questions(), verify, config)
    mixed = evaluate(second, questions().reverse(), verify, config)
    assert straight.equals(mixed)
    assert first.calls == second.calls
    draws = {seed for _, seeds, _ in first.calls for (seed,) in seeds}
    assert len(draws) == 10


def test_a_question_without_room_counts_as_wrong(tokenizer):
    engine = ScriptedEngine(tokenizer, max_length=len("Question: 1+1?\nAnswer:") + 1)
    results = evaluate(engine, questions(11), verify, Evaluation())
    assert results.height == 11
    assert results.filter(reason="too_long").rows() == [
        (f"{10:040x}", "10", None, False, "too_long", None)
    ]


def test_levels_are_optional_and_bad_questions_refused(tokenizer):
    engine = ScriptedEngine(tokenizer)
    plain = evaluate(engine, questions().drop("level"), verify, Evaluation())
    assert summarise_accuracy(plain)["level"].to_list() == ["all"]
    with pytest.raises(ValueError, match="2 ids come twice"):
        evaluate(engine, pl.concat([questions(), questions(2)]), verify, Evaluation())
    without = questions().with_columns(answer=pl.lit(None, pl.String))
    with pytest.raises(ValueError, match="10 questions have no answer"):
        evaluate(engine, without, verify, Evaluation())


def run(correct, levels=None):
    n = len(correct)
    return pl.DataFrame(
        {
            "id": [f"{i:040x}" for i in range(n)],
            "level": levels or [None] * n,
            "response": [""] * n,
            "correct": correct,
            "reason": ["match" if c else "wrong_answer" for c in correct],
            "finish_reason": ["stop"] * n,
        },
        schema=RESULT,
    )


def test_accuracy_by_level_orders_numbers_by_value():
    table = summarise_accuracy(run([True, False, True, True], ["10", "2", "2", "10"]))
    assert table.select("level", "n", "correct", "accuracy").rows() == [
        ("all", 4, 3, 0.75),
        ("2", 2, 1, 0.5),
        ("10", 2, 2, 1.0),
    ]
    whole = wilson(3, 4)
    assert table.row(0)[4:6] == (whole.low, whole.high)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=40))
def test_levels_add_up_to_the_whole(pairs):
    table = summarise_accuracy(run([c for c, _ in pairs], [level for _, level in pairs]))
    parts = table.filter(pl.col("level") != "all")
    whole = table.row(0, named=True)
    assert (parts["n"].sum(), parts["correct"].sum()) == (whole["n"], whole["correct"])
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()


def test_the_floor_is_named():
    assert at_floor(Interval(0.30, 0.22, 0.38), guess=0.25)
    assert not at_floor(Interval(0.40, 0.31, 0.49), guess=0.25)
    assert at_floor(wilson(1, 40))  # 0.4 % to 13 %: one right answer is luck
    assert not at_floor(wilson(5, 40))
    none_right = summarise_accuracy(run([False] * 50))
    assert none_right["at_floor"].item()
    assert none_right["high"].item() == pytest.approx(wilson(0, 50).high)


def test_seeds_give_the_mean_and_an_interval_over_seeds_and_questions():
    runs = [
        run([True] * 6 + [False] * 4),
        run([True] * 7 + [False] * 3),
        run([True] * 5 + [False] * 5),
    ]
    line = summarise_seeds(runs).row(0, named=True)
    assert (line["level"], line["seeds"], line["n"]) == ("all", 3, 10)
    assert line["accuracy"] == pytest.approx(0.6)
    assert (line["lowest"], line["highest"]) == (0.5, 0.7)
    seeds_only = stats.t.interval(0.95, 2, 0.6, stats.sem([0.6, 0.7, 0.5]))
    assert line["low"] < line["accuracy"] < line["high"]
    # The questions' spread counts as well, and with more freedom than two seeds have.
    assert line["high"] - line["low"] != pytest.approx(seeds_only[1] - seeds_only[0])
    question_means = [1.0] * 5 + [2 / 3, 1 / 3] + [0.0] * 3
    a, b = stats.sem([0.6, 0.7, 0.5]) ** 2, stats.sem(question_means) ** 2
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 9)
    half = stats.t.ppf(0.975, freedom) * (a + b) ** 0.5
    assert line["low"] == pytest.approx(max(0.0, 0.6 - half))
    assert line["high"] == pytest.approx(min(1.0, 0.6 + half))


def test_a_level_of_one_question_has_no_interval_and_seeds_must_match():
    runs = [run([True, True, False], ["a", "b", "b"]), run([True, False, False], ["a", "b", "b"])]
    table = summarise_seeds(runs)
    assert table.filter(level="a")["low"].to_list() == [None]
    assert table.filter(level="b")["accuracy"].item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="2 or more"):
        summarise_seeds(runs[:1])
    with pytest.raises(ValueError, match="different questions"):
        summarise_seeds([runs[0], runs[1].head(2)])


def test_arms_are_compared_pair_by_pair():
    better = [run([True] * 60 + [False] * 40), run([True] * 62 + [False] * 38)]
    worse = [run([True] * 50 + [False] * 50), run([True] * 52 + [False] * 48)]
    difference = compare(better, worse)
    assert difference.estimate == pytest.approx(0.10)
    assert 0 < difference.low < difference.high
    mirrored = compare(worse, better)
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low))
    single = compare(better[:1], worse[:1], seed=4)
    ids = better[0]["id"].to_list()
    assert single == paired_difference(ids, better[0]["correct"], worse[0]["correct"], seed=4)
    with pytest.raises(ValueError, match="2 runs against 1"):
        compare(better, worse[:1])


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"batch_rows": 0}])
def test_a_bad_configuration_is_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        Evaluation(**bad)


def test_a_real_engine_answers(tiny_model):
    from siftline.scoring.engines import transformers_engine as engines
    from siftline.scoring.engines.base import ModelSpec

    engine = engines.TransformersEngine(ModelSpec(path=str(tiny_model), max_length=64))
    config = Evaluation(max_new_tokens=6, batch_rows=3)
    results = evaluate(engine, questions(5), verify, config)
    assert results.equals(evaluate(engine, questions(5).reverse(), verify, config))
    assert results["finish_reason"].is_in(["stop", "length"]).all()
    engine.close()
