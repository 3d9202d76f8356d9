"""The decontamination gate on planted and real leaks, against sets of word n-grams."""

import json
import os
import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.text.words import words
from siftline.rows.schema import make_row, message
from siftline.stages.decontamination.decide import OVERLAP, Decontamination

VOCABULARY = [
    f"{a}{b}" for a in ("ba", "ko", "li", "mu", "te", "ra") for b in ("ne", "so", "ti", "va")
]


def frame(rows):
    made = []
    for prompt, response in rows:
        turns = [message("user", prompt)] if prompt else []
        row = make_row([*turns, message("assistant", response)])
        made.append((row["id"], row["prompt_id"], prompt, response))
    return pl.DataFrame(made, schema=["id", "prompt_id", "prompt", "response"], orient="row")


def reference(rows, role="test", name="benchmark"):
    return frame(rows).drop("prompt_id").with_columns(set=pl.lit(name), role=pl.lit(role))


def sentence(rng, n):
    return " ".join(rng.choice(VOCABULARY) for _ in range(n))


def grams(text, n=13):
    parts = words(text).split()
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


def run(pool, evaluation, **config):
    selector = Decontamination(**config)
    return selector.apply(pool, selector.index(evaluation))


def test_every_kind_of_overlap_is_found_and_named():
    rng = random.Random(0)
    long = [sentence(rng, 40) for _ in range(6)]
    near = long[2][:60] + "q" + long[2][61:]
    pool = frame(
        [
            (long[0], "another answer altogether"),
            (long[1].upper().replace(" ", ", ") + "?!", "punctuation and case changed"),
            (near, "one letter changed"),
            ("Discuss this: ", sentence(rng, 30) + " " + long[3] + " " + sentence(rng, 30)),
            ("WHO is it", "a short question"),
            (sentence(rng, 40), "nothing of it"),
            (
                "Please tell me who is it and why that would matter to us now",
                "contains a short one",
            ),
        ]
    )
    evaluation = reference([(text, "gold") for text in [*long, "Who is it?"]])
    selection = run(pool, evaluation)
    overlaps = selection.tables["overlaps"]
    assert dict(overlaps.schema) == OVERLAP
    got = dict(overlaps.select("id", "kind").rows())
    ids, gold = pool["id"].to_list(), evaluation["id"].to_list()
    assert [got.get(i) for i in ids] == ["prompt", "whole", "near", "ngram", "whole", None, None]
    matched = dict(selection.removed.select("id", "matched_id").rows())
    assert [matched[i] for i in ids[:5]] == [*gold[:4], gold[6]]
    assert selection.removed["reason"].unique().to_list() == ["overlaps_test"]
    assert selection.facts["removed_by_set"] == {"benchmark": 5}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(14, 40), st.integers(0, 40))
def test_the_share_is_that_of_the_evaluation_row(seed, length, kept):
    rng = random.Random(seed)
    question = sentence(rng, length)
    parts = question.split()
    leak = " ".join(parts[: min(kept, length)])
    pool = frame([("Some request.", f"{sentence(rng, 20)} zz {leak} zz {sentence(rng, 20)}")])
    selection = run(pool, reference([(question, "gold")]), min_share=0.3, near=1.0)
    whole = grams(question)
    share = len(whole & grams(pool["response"][0])) / len(whole)
    if share >= 0.3:
        assert selection.removed["value"].to_list() == [share]
        assert selection.removed["threshold"].to_list() == [0.3]
    else:
        assert selection.removed.is_empty()


def template(numbers):
    a, b, c = numbers
    return (
        f"A farmer has {a} rows of trees in his field and picks from each row {b} baskets of ripe "
        f"fruit every day. How many baskets does he fill within {c} days of picking all the rows?"
    )


def test_instances_with_other_numbers_are_other_questions():
    evaluation = reference([(template((12, 7, 5)), "420")])
    pool = frame(
        [(template((13, 9, 4)), "468"), (template((12, 7, 5)).replace("ripe", "red"), "x")]
    )
    selection = run(pool, evaluation)
    assert selection.removed["id"].to_list() == [pool["id"][1]]


def test_boilerplate_of_a_set_is_not_evidence():
    rng = random.Random(1)
    definition = sentence(rng, 60)
    inputs = [sentence(rng, 20) for _ in range(30)]
    evaluation = reference([(f"{definition} {text}", "gold") for text in inputs[:20]])
    pool = frame([(f"{definition} {text}", "mine") for text in inputs[15:]])
    selection = run(pool, evaluation, near=0.95)
    assert set(selection.removed["id"]) == set(pool["id"][:5])
    everything = run(pool, evaluation, near=0.95, common=1000)
    assert everything.removed.height == 15


def test_roles_and_sets_are_told_apart():
    rng = random.Random(2)
    question = sentence(rng, 30)
    pool = frame([(question, "mine"), (sentence(rng, 30), "clean")])
    sets = [("dev", "a"), ("target", "b"), ("test", "c")]
    evaluation = pl.concat([reference([(question, name)], role, name) for role, name in sets])
    selection = run(pool, evaluation)
    assert selection.removed["reason"].to_list() == ["overlaps_test"]
    assert selection.tables["overlaps"]["set"].sort().to_list() == ["a", "b", "c"]
    only = run(pool, evaluation.filter(role="target"))
    assert only.removed["reason"].to_list() == ["overlaps_target"]
    nothing = run(pool, evaluation.clear())
    assert nothing.vacuous
    assert nothing.removed.is_empty()


def test_plain_text_and_empty_texts():
    rng = random.Random(3)
    text = sentence(rng, 50)
    evaluation = pl.concat([reference([("", text), ("", "")]), reference([(text[:100], "x")])])
    pool = frame([("", text), ("", "..."), ("", ""), ("?", ""), ("", sentence(rng, 50))])
    kept = run(pool, evaluation.filter(pl.col("response") != "")).kept.to_list()
    assert sorted(kept) == sorted(pool["id"][1:])


def test_decisions_do_not_depend_on_buckets_or_order():
    rng = random.Random(4)
    questions = [sentence(rng, rng.randint(5, 40)) for _ in range(80)]
    pool = [(q, sentence(rng, 10)) for q in questions[:40]]
    pool += [(sentence(rng, 15), f"{sentence(rng, 9)} {q}") for q in questions[20:60]]
    pool += [(sentence(rng, 30), sentence(rng, 10)) for _ in range(100)]
    evaluation = reference([(q, "gold") for q in questions])
    table = frame(pool)
    selector = Decontamination()
    whole = selector.apply(table, selector.index(evaluation))
    assert whole.removed.height > 60
    index = selector.index(evaluation.sample(fraction=1.0, shuffle=True, seed=1))
    for buckets in (4, 16):
        mixed = table.sample(fraction=1.0, shuffle=True, seed=buckets)
        parts = [selector.apply(mixed[k::buckets], index) for k in range(buckets)]
        assert pl.concat([p.decisions for p in parts]).sort("id").equals(whole.decisions)
        tables = pl.concat([p.tables["overlaps"] for p in parts]).sort("id")
        assert tables.equals(whole.tables["overlaps"].sort("id"))


def test_refusals():
    with pytest.raises(ValueError, match="role 'train'"):
        Decontamination().index(reference([("a", "b")], role="train"))
    for wrong in ({"ngram": 0}, {"min_share": 0.0}, {"near": 1.5}, {"common": 0}):
        with pytest.raises(ValueError, match="must be"):
            Decontamination(**wrong)


def test_gsm8k_test_questions_planted_in_train_are_found():
    root = os.environ.get("SIFTLINE_TEST_DATA")
    folder = Path(root or ".") / "gsm8k"
    if root is None or not (folder / "test.jsonl").exists():
        pytest.skip("SIFTLINE_TEST_DATA does not hold gsm8k")
    read = lambda name: [  # noqa: E731
        (d["question"], d["answer"]) for d in map(json.loads, (folder / name).open())
    ]
    train, test = read("train.jsonl"), read("test.jsonl")
    leaks = [("Solve.", f"Here is one more: {q.lower()}\n{a}") for q, a in test[::20]]
    pool = frame(train + leaks)
    selection = run(pool, reference(test))
    leaked = set(pool["id"][len(train) :])
    removed = set(selection.removed["id"])
    assert leaked <= removed
    assert len(removed - leaked) < 0.01 * len(train)
