"""Verdicts on single answers: the public cases that once went wrong, and their siblings."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.equality import judge
from siftline.scoring.answers.find import MOST_CANDIDATES, extract_answer, find_answers
from siftline.scoring.answers.latex import normalise, shell, without_unit
from siftline.scoring.answers.quantities import answer_key, parse_quantity
from siftline.scoring.verifiers import MathVerifier

CASES = Path(__file__).parents[2] / "cases" / "math"
SAYS = {
    "right": {True},
    "wrong": {False},
    "open": {None},
    "not_right": {False, None},
    "not_wrong": {True, None},
}


def read(name):
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def math():
    verifier = MathVerifier(timeout=20, steps=False)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("name", ["cases.jsonl", "siblings.jsonl"])
def test_every_case_has_its_verdict(math, name):
    rows = read(name)
    assert len(rows) >= 81
    said = [(row, math(row["response"], row["reference"])) for row in rows]
    assert [(r, v) for r, v in said if v.correct not in SAYS[r["want"]]] == []
    assert all(v.reason.startswith("unreadable: ") or v.extracted is None
               for _, v in said if v.correct is None)  # fmt: skip


@pytest.mark.parametrize(
    ("response", "texts"),
    [
        ("\\boxed{2}, \\boxed{3}", ["2, 3"]),
        ("$x=\\boxed{2}$ and $y = \\boxed{3}$", ["2, 3"]),
        ("\\boxed{2}. So we go on.\nThen \\boxed{3}", ["2", "3"]),
        ("\\boxed{2}, that is \\boxed{2}", ["2"]),
        ("\\boxed{\\{1, 2\\}}", ["\\{1, 2\\}"]),
        ("\\boxed{\\frac{1}{\\boxed{2}}}", ["\\frac{1}{{2}}"]),
        ("$x = -\\boxed{5}$", ["-(5)"]),
        ("the answer is 3, I think. The final answer is 4.", ["4"]),
        ("\\boxed{4}. The answer is in metres.", ["4"]),
        ("\\boxed{4}. The answer is 5.", ["4", "5"]),
        ("**Final Answer**\n\n\\boxed{4}", ["4"]),
        ("### Answer:\n* 12 cm", ["12 cm"]),
        ("### Answer:\n- 12 cm", ["- 12 cm"]),
        ("### Answer\nWe add the numbers.\nThis gives 12.", []),
        ("The final answer is:\n\\begin{align*}x = 2\\end{align*}", ["x = 2"]),
        ("If the answer is 5, we are done.", []),
        ("Answer:", []),
        ("答案是 12。", ["12"]),
        ("<think>\\boxed{1}</think>", []),
        ("The answer is 12 * 3 = <<12*3=36>>36 eggs.", ["36 eggs"]),
        (" ".join(f"\\boxed{{{i}}}. Then" for i in range(MOST_CANDIDATES + 1)), []),
    ],
)
def test_what_is_found(response, texts):
    assert [found.text for found in find_answers(response)] == texts


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="\\boxed{} answer is:\n#$1,2<think>/*A", max_size=120))
def test_whatever_is_found_stands_in_the_text(response):
    for found in find_answers(response):
        assert found.text
        assert found.end <= len(response) + 1
    found = find_answers(response)
    assert extract_answer(response) == (found[-1].text if found else None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(-999, 999),
    st.sampled_from(
        ["\\boxed{{{}}}", "#### {}", "The answer is {}.", "**Answer**: {}", "Answer:\n{}",
         "### Final Answer\n{}", "The final answer is:\n\n\\[{}\\]",
         "The answer is $\\boxed{{{}}}$", "**Final Answer:** ${}$", "So the answer is **{}**."]
    ),
    st.sampled_from(["<think>\nI get \\boxed{{{}}}.\n</think>\n", "<thinking>#### {}</thinking>",
                     "[THINK]The answer is {}.[/THINK]", "thoughts: \\boxed{{{}}}</think>\n", ""]),
)  # fmt: skip
def test_every_mark_is_read_and_no_reasoning(number, mark, reasoning):
    other = number + 1
    response = reasoning.format(other) + mark.format(number)
    ask = lambda reference, answer: None  # noqa: E731
    (found,) = find_answers(response)
    assert judge(found.text, str(number), ask).equal is True
    assert judge(found.text, str(other), ask).equal is False


TWO = [
    "\\boxed{{{}}} or \\boxed{{{}}}", "\\boxed{{{}}}\nThe answer is {}.",
    "#### {}\n\nWait.\n#### {}", "The answer is {}. No, the answer is {}.",
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99), st.sampled_from(TWO))
def test_of_two_answers_none_is_a_match_alone(math, first, second, wanted, form):
    """Open if one of them is the reference; a mismatch, if neither is; a match if both are."""
    verdict = math(form.format(first, second), str(wanted))
    right = {first == wanted, second == wanted}
    assert verdict.correct is (None if len(right) > 1 else right.pop())


REPEATED = [
    "\\boxed{", "\\boxed{1} ", "\\boxed{a}, ", "A: \n", "A: 1\n", "#### 1\n", "the answer is ",
    "answer:\n", "answer: 5\n", "final answer is $$", "Answer: \\[", "<think>", "$", "{", "\\", " ",
    "1,", "(", "\\frac{", "\\text{", "0.\\overline{", "=", "**answer** ", "!", "\\left(", "1 ",
]  # fmt: skip


@pytest.mark.parametrize("piece", REPEATED)
def test_time_grows_with_the_length_and_no_faster(piece):
    """Four times the text takes about four times as long, and 800 kB take seconds."""

    def seconds(size):
        text = piece * (size // len(piece))
        started = time.process_time()
        find_answers(text)
        answer_key(text)
        parse_quantity(text)
        judge(text, "5", lambda reference, answer: None)
        return time.process_time() - started

    # The least of three: a busy machine takes its time from any one of them.
    short, long = (min(seconds(size) for _ in range(3)) for size in (100_000, 400_000))
    assert long < 0.2 or long < 12 * short
    assert long < 10


@pytest.mark.parametrize("piece", REPEATED)
def test_the_longest_answer_that_is_judged_takes_no_time(piece):
    text = (piece * 2000)[:2000]
    started = time.process_time()
    for read_by in (shell, normalise, without_unit):
        read_by(text)
    judge(text, "5", lambda reference, answer: None)
    assert time.process_time() - started < 2
