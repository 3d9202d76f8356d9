# ruff: noqa: E501, RUF001 (responses stand on one line each, in their own script)
"""Letters of multiple-choice answers, and texts compared as a whole: what is read, what is open."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.scoring.verifiers import get_verifier

LETTERS = st.sampled_from("ABCDE")
FORMS = [
    "{}", "({})", "{}.", "**{}**", "**({})**", "`{}`", "[{}]", "\"{}\"", "Option {}", "{}) Paris",
    "{}. Paris", "**{}. Paris**", "{}: Paris",
    "#### {}", "#### ({})", "\\boxed{{{}}}", "\\boxed{{\\text{{{}}}}}", "$\\boxed{{\\textbf{{({})}}}}$",
    "\\boxed{{\\mathrm{{{}}}}}", "\\boxed{{{}. Paris}}", "\\[\\boxed{{{}}}\\]", "\\boxed{{\\text{{{}) 42}}}}",
    "<answer>{}</answer>", "<answer> ({}) </answer>", "<answer>{}. Paris</answer>",
    "The answer is {}.", "The answer is ({}).", "the answer is {}", "The answer is **{}**.",
    "The answer is: {}", "The final answer is {}. Done.", "The correct answer is ({}) Paris.",
    "The correct option is {}", "the correct option is {}.", "The correct choice is therefore {}.",
    "The best answer is option {}.", "The right answer is clearly {}, because it rains.",
    "The answer must be {}.", "The answer to the question is {}.", "The most likely answer is {}.",
    "**Answer**: {}", "**Answer:** {}", "**Answer: {}**", "Answer: {}", "answer: ({})", "ANSWER: {}",
    "Answer: Option {}", "**Final Answer:** {}", "**Final Answer**: **{}**", "Answer = {}",
    "Answer: {}) Paris", "Answer: {}. Paris", "Answer: **{}. Paris**", "Answer -> {}",
    "### Answer\n{}", "## Final Answer\n\n**{}**", "### Answer:\n({}) Paris", "**Answer**\n\n{}. Paris",
    "**Correct answer**\n{}", "1. Answer\n{}",
    "Option {} is correct.", "({}) is correct.", "Option {} is the correct answer.",
    "({}) Paris is the right answer.", "So option {} must be true.",
    "I choose {}.", "I would go with {}.", "We should select option {}.", "I'll pick ({}).",
    "Therefore, {}.", "Hence ({})", "So it is {}.",
    "It rains.\n\n{}", "It rains in Paris. It is wet.\n**{}**", "{}\n\nBecause it rains. And it is wet.",
    "({})\nBecause it rains.", "{}. Paris\n\nParis is the capital. Rome is not.",
    "Let's see. A dog is no cat.\nThe answer is {}.", "If the answer were Z, it would rain. The answer is {}.",
    "Is the answer Z? No. The answer is {}.", "The answer is not Z. The answer is {}.",
    "The wrong answer is Z. The correct answer is {}.", "Option Z is incorrect. Option {} is correct.",
    "Maybe the answer is Z. Let me check.\nThe answer is {}.",
    "答案是{}", "答案：{}", "故选{}。", "La respuesta es {}.", "Die Antwort ist {}.", "Réponse : {}",
    "<think>It could be Z. The answer is Z.</think>{}", "<think>The answer is Z</think>\n\n**Answer**: {}",
    "The answer is Z.</think>\nThe answer is {}.", "<thinking>\\boxed{{Z}}</thinking>\\boxed{{{}}}",
    "<|channel|>analysis<|message|>Z<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "The answer is {} rather than Z.", "The answer is option {}, not option Z.",
    "Z is wrong. So {}.", '{{"answer": "{}"}}', "The correct letter is {}.", "Answer\n======\n{}",
    "A: Let's think. The answer is {}.", "{}\n", "  {}  ",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("letter", ["A", "B", "I"])
def test_a_marked_letter_is_the_choice(form, letter):
    if "A:" in form and letter == "A":
        return
    response = form.format(letter)
    verify = get_verifier("choice")
    if letter == "I" and ("{} is" in form or form in ("Therefore, {}.", "So it is {}.")):
        return
    assert verify(response, letter).reason == "match", response
    assert verify(response, f"({letter}) Paris").reason == "match", response
    assert verify(response, "G").reason == "wrong_answer", response


@pytest.mark.parametrize("form", ["({})", "{}", "{})", "\\boxed{{{}}}", "#### {}", "Answer: {}",
                                  "the answer is {}", "the answer is ({})", "**Answer**: {}."])  # fmt: skip
def test_small_letters_count_too(form):
    assert get_verifier("choice")(form.format("b"), "B").reason == "match"


OPEN = [
    "The answer is B or C.", "The answer is B and C.", "Answer: B/C", "Answer: B, C", "B or C", "(B) or (C)",
    "Either B or C.", "The answer is either B or C.", "Both A and B are correct.", "A and B are correct",
    "The answer is probably B.", "The answer might be B.", "The answer could be B.", "It may be B.",
    "Maybe B.", "Perhaps the answer is B.", "The answer is likely B.", "I guess the answer is B.",
    "The answer is B, but it could be C.", "The answer is B, or maybe C.", "The answer is B. I'm not sure, though.",
    "I am not sure, but the answer is B.", "Answer: B?", "Is the answer B?", "If the answer is B, it rains.",
    "Suppose the answer is B.", "The answer is B if x > 0, otherwise C.",
    "The answer is B. Wait, no, the answer is C.", "The answer is B.\n\\boxed{C}", "\\boxed{B} \\boxed{C}",
    "#### B\n#### C", "**Answer**: B\n\n**Answer**: C", "B\n\nThe answer is C.", "B\nIt rains.\nC",
    "Option B is correct. Option C is correct.", "The correct option is B. So the final answer is C.",
    "A) Paris\nB) Rome", "Options:\nA) Paris\nB) Rome\nC) Bonn", "Answer:\nA) Paris\nB) Rome",
    "The answer is a dog.", "The answer is A dog.", "A dog barks.", "I think it rains.", "The answer is not B.",
    "The answer isn't B.", "Option B is incorrect.", "B is wrong.", "The wrong answer is B.", "", "Paris", "\\boxed{5}",
    "<think>The answer is B.</think>", "<think>The answer is B.", "<think>B</think> I can't tell.",
    "The answer is B-trees.", "The answer is C++.", "The correct answer is: B. 42 and C. 43", "Answer: None", "The answer is not A but B.", "The answer is B's.",
]  # fmt: skip


@pytest.mark.parametrize("response", OPEN)
def test_what_is_no_choice_is_open(response):
    for wanted in "ABC":
        assert get_verifier("choice")(response, wanted).correct is None, response


@given(LETTERS, LETTERS, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_two_choices_match_and_mismatch_only_if_they_are_one(first, second, one, other):
    """Marks that name different letters are never a proof, whatever stands between them."""
    marks = ("The answer is {}.", "\\boxed{{{}}}", "#### {}", "**Answer**: {}")
    one, other = (form if form in marks else marks[len(form) % 4] for form in (one, other))
    response = f"{one.format(first)}\nSo much for that.\n{other.format(second)}"
    verdict = get_verifier("choice")(response, first)
    assert verdict.correct is (True if first == second else None), response


@pytest.mark.parametrize("answer", ["Paris", "", "A dog", "B or C"])
def test_a_reference_that_is_no_letter_proves_nothing(answer):
    assert get_verifier("choice")("The answer is B.", answer).reason == "no_reference"


@given(st.text(alphabet="ABCab .,:()*\n#?orisnwe", max_size=60))
def test_any_text_has_a_verdict(text):
    verdict = get_verifier("choice")(text, "B")
    assert verdict == get_verifier("choice")(text, "B")
    assert verdict.correct is not True or "b" in text.lower()


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("<think>Rome? No.</think>\nParis", "paris", True),
        ("<think>Rome? No.</think>\n<answer>Paris</answer>", "Paris", True),
        ("<answer>\nParis\n</answer>", "Paris", True),
        ("Rome? No.</think> Paris.", "Paris", True),
        ("<reasoning>Rome</reasoning>Rome", "Paris", False),
        ("<think>Paris", "Paris", None),
        ("<think>Paris</think>", "Paris", None),
        ("[THINK]x[/THINK]\"Paris\"", "Paris", True),
    ],
)  # fmt: skip
def test_whole_texts_without_their_reasoning(response, answer, correct):
    assert get_verifier("exact")(response, answer).correct is correct


def test_verbatim_leaves_reasoning_out_and_keeps_the_rest():
    assert get_verifier("verbatim")("<think>x</think>\n\n Paris.", "Paris.").correct is True
    assert get_verifier("verbatim")("<think>x</think>paris.", "Paris.").correct is False


def test_a_response_that_is_too_long_is_refused():
    for name in ("choice", "exact", "verbatim", "code"):
        verdict = get_verifier(name)("B" * 3_000_000, "assert 1 == 1" if name == "code" else "B")
        assert verdict.correct is None
        assert verdict.reason == "unreadable: 3000000 characters are too many"


@pytest.mark.parametrize(
    "unit",
    ["The answer is B. ", "\\boxed{", "\\boxed{B}", "#### B\n", "B or ", "A) x\n", "answer: ", "answer ", "if ",
     "Option B is ", "the ", "*", "\\text{", "<answer>", "B\n", "A: ", "(", " ", "so ", "not sure ", "answer to "],
)  # fmt: skip
@pytest.mark.parametrize("name", ["choice", "exact"])
def test_the_cost_grows_with_the_length(name, unit):
    def seconds(size):
        text = unit * (size // len(unit))
        best = 9.0
        for _ in range(3):
            started = time.process_time()
            get_verifier(name)(text, "B")
            best = min(best, time.process_time() - started)
        return best

    assert seconds(120_000) < 10 * seconds(30_000) + 0.05
