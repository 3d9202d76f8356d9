"""Boxes of steps give way to the answer at the end, where the text's structure says so."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.answers.find import find_answers
from siftline.scoring.verifiers import get_verifier

STEPPED = {
    "steps": "Step 1: \\boxed{3}.\n\nStep 2: twice \\boxed{6}.\n\nThe final answer is \\boxed{12}.",
    "bold": "**Step 1:** half \\boxed{6}\n\n**Step 2:** twice \\boxed{24}\n\nThus, $\\boxed{12}$",
    "numbers": "1. Radius \\boxed{3}\n2. Side \\boxed{4}\n\n**Final Answer**\n\\boxed{12}",
    "headings": "### Step 1\nNow\n\\[\\boxed{5}\\]\n\n### Step 2\n\n### Answer\n\\[\\boxed{12}\\]",
    "alone": "First, \\(x = \\boxed{3}\\).\n\nThen y = 4.\n\n\\[\n\\boxed{12}\n\\]",
    "phrase": "Step 1: \\boxed{3}.\nStep 2: add nine.\n\nThe final answer is 12.",
    "last step": "Step 1: it is \\boxed{3}.\n\nStep 2: the final answer is \\boxed{12}.",
}
UNCERTAIN = {
    "two answers": "The answer is \\boxed{5}.\n\nTherefore the answer is \\boxed{12}.",
    "a step that answers": "Step 1: the answer is \\boxed{5}.\n\nTherefore \\boxed{12}.",
    "taken back": "Step 1: \\boxed{5}.\n\nWait, that is wrong.\n\nSo \\boxed{12}.",
    "parts": "(a) \\boxed{5}\n\n(b) \\boxed{12}",
    "steps with parts": "Step 1: (see below)\n(a) \\boxed{5}\n\nSo \\boxed{12}",
    "no marks": "We get \\boxed{5}.\n\nSo it is \\boxed{12}.",
    "no end": "Step 1: \\boxed{5}.\n\nStep 2: \\boxed{12}.",
    "goes on": "Step 1: \\boxed{5}.\n\nSo \\boxed{12}.\n\nOne more remark on that.",
    "one paragraph": "1. we get \\boxed{5} and so \\boxed{12}, in one paragraph.",
}


@pytest.fixture(scope="module")
def check():
    return get_verifier("math")


@pytest.mark.parametrize("name", STEPPED)
def test_the_last_box_wins_over_those_of_steps(check, name):
    text = STEPPED[name]
    assert [found.text for found in find_answers(text)] == ["12"]
    assert check(text, "12").correct is True
    for other in ("3", "4", "5", "6", "24"):
        assert check(text, other).correct is False


@pytest.mark.parametrize("name", UNCERTAIN)
def test_boxes_that_may_each_be_meant_stay_open(check, name):
    text = UNCERTAIN[name]
    assert check(text, "12").correct is None
    assert check(text, "5").correct is None
    assert check(text, "7").correct is False


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=5),
    st.integers(1000, 2000),
    st.sampled_from(["Step {}: ", "**Step {}.** ", "{}. ", "{}) ", "## Step {}\n"]),
    st.sampled_from(
        ["The final answer is \\boxed{{{}}}.", "Therefore, \\boxed{{{}}}", "\\boxed{{{}}}"]
    ),
)
def test_no_step_is_ever_the_answer(values, last, mark, end):
    steps = [mark.format(i) + f"we get \\boxed{{{v}}}." for i, v in enumerate(values, start=1)]
    text = "\n\n".join([*steps, end.format(last)])
    assert [found.text for found in find_answers(text)] == [str(last)]


def test_many_boxes_cost_in_proportion():
    def seconds(count):
        text = "Step 1: " + "we get \\boxed{3}, then\n" * count + "\n\nSo \\boxed{4}"
        start = time.process_time()
        find_answers(text)
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 40 * max(seconds(2_000), 0.01)


MEASURES = [
    ("18 km/h", "5 m/s", True),
    ("18 \\text{ km/h}", "18 kilometers per hour", True),
    ("5 km/h", "5 m/s", False),
    ("5 \\text{ cm}^2", "5 \\text{ m}^2", False),
    ("50000 cm^2", "5 m^2", True),
    ("2 square feet", "288 square inches", True),
    ("5 Hz", "5 kHz", False),
    ("30 \\text{ mph}", "44 ft/s", True),
    ("60 mph", "60 km/h", None),
    ("\u20ac5", "\\$5", None),
    ("5 euros", "5 dollars", None),
    ("5 cups", "5 liters", None),
    ("1 GB", "1024 MB", None),
    ("0 \\text{ degrees C}", "32 \\text{ degrees F}", None),
    ("5\\pi \\text{ cm}", "5\\pi \\text{ m}", None),
    ("5\\pi \\text{ cm}", "5\\pi", True),
    ("12 cm", "12", True),
    ("5 hours", "5", True),
    ("3 m", "3 meters", True),
]


@pytest.mark.parametrize(("given", "reference", "want"), MEASURES)
def test_measures_are_converted_or_open(check, given, reference, want):
    assert check(f"\\boxed{{{given}}}", reference).correct is want
    assert check(f"\\boxed{{{reference}}}", given).correct is want


@pytest.mark.parametrize(
    ("given", "reference", "want"),
    [
        ("x\\equiv 7\\pmod{12}", "x \\equiv 7 \\pmod{12}", True),
        ("\\{x \\mid x > 2, x \\ne 5\\}", "\\{x\\mid x>2, x\\ne 5\\}", True),
        ("1.234.567", "1234567", True),
        ("1.234.567", "1234568", None),
        ("3,5", "3.5", None),
        ("3,5", "3.6", False),
        ("1,234", "1.234", False),
        ("1 2", "12", None),
        ("5!!", "15", None),
        ("5!", "120", True),
        ("0x1F", "31", None),
        ("2.5k", "2500", None),
        ("5k", "5k", True),
        ("30\u00b0", "\\pi/6", True),
        ("30\u00b0", "\\pi/3", False),
        ("6 \\text{ cubic cm}", "6 cm^3", True),
        ("7 \\text{ cubic cm}", "6 cm^3", False),
        ("\\text{North East}", "northeast", None),
        ("\\text{North East}", "northwest", False),
    ],
)
def test_equal_texts_are_equal_and_other_separators_prove_nothing(check, given, reference, want):
    assert check(f"\\boxed{{{given}}}", reference).correct is want


def test_answers_that_stand_apart_do_not_refute_the_list_of_them(check):
    text = "$\\boxed{5}$ apples and $\\boxed{6}$ pears"
    assert check(text, "5, 6").correct is None
    assert check(text, "5 and 6").correct is None
    assert check(text, "5, 7").correct is False
    assert check(text, "7").correct is False
