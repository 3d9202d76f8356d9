"""Steps of worked solutions: which equation is the first false one."""

import json
import os
import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.expressions import Reader, tokens
from siftline.scoring.answers.steps import Trace, equations, steps, trace
from siftline.scoring.verifiers import verify_math

DATA = os.environ.get("SIFTLINE_TEST_DATA")


def held(step):
    return [equation.holds for equation in equations(step)]


@pytest.mark.parametrize(
    "step",
    [
        "12 * 3 = 36",
        "She buys 12 clips * 3 = 36 clips in May",
        "<<48/2=24>>",
        "1,200 + 300 = 1,500",
        "$5 x 3 = $15",
        "3 \u00d7 4 = 12",
        "2(3 + 4) = 14",
        "(2 + 3)(4 - 1) = 15",
        "20% of 50 = 10",
        "50 * 20% = 10",
        "15/60 = 25%",
        "(15/60) * 100 = 25%",
        "20% + 30% = 50%",
        "100% - 20% = 80%",
        "3/4 of 20 = 15",
        "1/2 + 1/4 = 3/4",
        "3 1/2 * 2 = 7",
        "7/2 = 3 1/2",
        r"\frac{1}{2} \times 8 = 4",
        r"$5 \times 3 = 15$",
        r"\(6 \div 4 = 1.5\)",
        "10/3 = 3.33",
        "10/3 = 3.3",
        "2/3 = 0.66",
        "2/3 = 66.7%",
        "2^10 = 1024",
        "2**3 = 8",
        "5 - -3 = 8",
        "-5 + 3 = -2",
        "\u22125 + 3 = \u22122",
        "**3 * 4 = 12**",
        "3 plus 4 = 7",
        "18 divided by 3 = 6",
        "$18/hour * 2 hours = $36",
        "2 million * 3 = 6 million",
        "60 miles / 2 hours = 30 mph",
        "8 = 2 * 4",
        "7*3 = 21 \\text{ apples}",
    ],
)
def test_true_equations(step):
    assert held(step) == [True], equations(step)


@pytest.mark.parametrize(
    "step",
    [
        "12 * 3 = 35",
        "<<48/2=25>>",
        "1,200 + 300 = 1,400",
        "$5 x 3 = $16",
        "20% of 50 = 20",
        "15/60 = 24%",
        "1/2 + 1/4 = 2/4",
        r"\frac{1}{2} \times 8 = 5",
        "10/3 = 3.34",
        "2/3 = 0.65",
        "5 - -3 = 2",
        "-5 + 3 = 2",
        "13 marbles + 4 marbles + 16 marbles = 45 marbles",
        "100 stickers / 3 = 32",
        "100 / 3 = 34",
        "99 / 3 = 32",
        "100 / 3 = 33 + 1",
        "10 * 3.1 = 30",
        "So he needs 3 boxes * 4 = 13 apples.",
        "2(3 + 4) = 13",
    ],
)
def test_false_equations(step):
    assert held(step) == [False], equations(step)


@pytest.mark.parametrize(
    "step",
    [
        "x + 3 = 10",
        "2x = 10",
        "3x = 2 * 5",
        "(5/2)x = 925",
        "5A - 5 = 30",
        "We get X = $1200 by 11/20",
        "speed = 5",
        "12 = 13",
        "1 hour = 60 minutes",
        "2 hours * 60 = 100 minutes",
        "50 + 10% = 55",
        "5 pm + 3 = 8",
        "6:00 + 18 = 0:00",
        "17 / 5 = 3 remainder 2",
        "17 / 5 = 3 full boxes",
        "100/3 = 33",
        "100 stickers / 3 = 33",
        "<<100/3=33>>",
        "200/3 = 67",
        "200/3 = 66",
        "15/2 = 8",
        "-100/3 = -33",
        "25 / 1/3 = 75",
        "32 / 2 = 16 million",
        "2 dozen * 3 = 72",
        "The area of 4 rooms = 121 * 4",
        "1 / 0 = 5",
        "2 ^ 99 = 1",
        "3 * 4 \u2248 13",
        "a week = 5 + 3 days",
        "she has 3 =",
        "= 3 + 4",
        "Step 2 - 3 * 4 = 12",
        "__import__('os') * 3 = 4",
        "",
    ],
)
def test_what_is_not_certain_is_not_called_false(step):
    assert False not in held(step), equations(step)


def test_chains_and_running_totals():
    assert held("2 * 3 = 4 + 2 = 6") == [True, True]
    assert held("2 * 3 = 6 + 1 = 7") == [True, True]
    assert held("2 * 3 = 6 + 1 = 8") == [True, False]
    assert held("2 * 3 = 5 = 10 / 2") == [False, True]


def test_steps_are_sentences_of_lines():
    text = "1. He has 3.5 cups. Then 4!\n\n2) So 7.\nAnswer: 7.5"
    assert steps(text) == ["1. He has 3.5 cups.", "Then 4!", "2) So 7.", "Answer: 7.5"]
    assert steps("") == []


def test_a_trace_names_the_first_false_step_and_what_was_right_before():
    solution = "He has 2*3=<<2*3=6>>6 cups.\nHe drinks 6-1=<<6-1=4>>4 cups. Then 4*2=8.\n#### 8"
    assert trace(solution) == Trace(1, "6", 3)
    assert trace("He has 2*3 = 6.\nSo 6 * $4 = $24.") == Trace(None, "24", 2)
    assert trace("I think it is 18") == Trace(None, None, 0)
    assert trace("3 * 3 = 8 and so 8 + 1 = 9") == Trace(0, None, 1)


def test_verdicts_carry_the_trace_of_refuted_responses_only():
    wrong = verify_math("2*3=6.\n6+4=11.\n#### 11", "10")
    assert (wrong.correct, wrong.first_error, wrong.last_right) == (False, 1, "6")
    lucky = verify_math("2*3=6.\n6+4=11.\n#### 10", "10")
    assert (lucky.correct, lucky.first_error, lucky.last_right) == (True, None, None)
    silent = verify_math("2*3=6.\n6+4=11.", "10")
    assert (silent.correct, silent.first_error) == (None, None)


@st.composite
def written(draw, depth=2):
    """An expression as text, and its value by Python's own arithmetic."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 2000))
        return (f"{number:,}" if draw(st.booleans()) else str(number)), Fraction(number)
    (a, x), (b, y) = draw(written(depth=depth - 1)), draw(written(depth=depth - 1))
    sign = draw(st.sampled_from("+-*/"))
    if sign == "/" and y == 0:
        sign = "+"
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else 0}[sign]
    return f"({a}) {sign} ({b})", value


@settings(max_examples=60, deadline=None)
@given(written())
def test_expressions_are_what_python_makes_of_them(made):
    text, value = made
    reader = Reader(tokens(text))
    assert reader.sum() == (value, value)
    assert reader.peek() == "end"


@settings(max_examples=60, deadline=None)
@given(written(), st.fractions(-9, 9, max_denominator=4))
def test_an_equation_holds_exactly_if_its_sides_are_equal(made, off):
    text, value = made
    shown = value + off
    step = f"So {text} + 0 = {shown.numerator}/{shown.denominator}"
    assert held(step) == [off == 0]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789+-*/=%$().,^ xab\n<>of", max_size=60))
def test_any_text_has_a_trace(text):
    found = trace(text)
    assert found == trace(text)
    assert found.first_error is None or 0 <= found.first_error < len(steps(text))


def test_long_and_deep_texts_end():
    for text in ("(" * 5000 + "1=1", "1+" * 900 + "1=2", "9^9^9^9=1", "-" * 1500 + "1 = 2",
                 "9" * 1900 + " + 1 = 2", "1=" * 900, "<<" * 900):  # fmt: skip
        trace(text)


@pytest.mark.skipif(not DATA, reason="SIFTLINE_TEST_DATA is not set")
def test_right_solutions_are_hardly_ever_faulted_and_planted_errors_are_found():
    lines = (Path(DATA) / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines[:500]]
    faulted = [a for a in answers if trace(a).first_error is not None]
    # Those that are have a slip in the data themselves: "70 + 40 = 100", "8 - 8*3" for 80*3.
    assert len(faulted) <= 0.01 * len(answers)
    draws = random.Random(5)
    found = planted = 0
    for answer in answers[:300]:
        marks = [line for line in answer.split("\n") if "<<" in line]
        if answer in faulted or not marks:
            continue
        line = draws.choice(marks)
        _, _, rest = line.partition("<<")
        left, _, result = rest.partition(">>")[0].partition("=")
        written = f"{left}={result}>>{result}"
        if not (result.isdigit() and set(left[1:]) & set("+-*/") and written in line):
            continue
        spoiled = f"{left}={int(result) + 1}>>{int(result) + 1}"
        bad = answer.replace(line, line.replace(written, spoiled, 1), 1)
        planted += 1
        place = next(i for i, step in enumerate(steps(bad)) if spoiled in step)
        found += trace(bad).first_error == place
    assert planted > 200
    assert found == planted


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="SIFTLINE_TEST_DATA is not set")
def test_all_of_gsm8k_has_few_false_equations():
    """The figures of docs/verifiers.md."""
    answers = [
        json.loads(line)["answer"]
        for split in ("train", "test")
        for line in (Path(DATA) / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]
    found = [e.holds for answer in answers for step in steps(answer) for e in equations(step)]
    assert (len(answers), found.count(True), found.count(False)) == (8792, 55321, 29)
