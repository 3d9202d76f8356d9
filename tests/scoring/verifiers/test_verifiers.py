import threading
import time
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.recipe.kinds import Stage
from siftline.rows.selection import select
from siftline.scoring.answers.equivalence import Equivalence, EquivalenceError
from siftline.scoring.answers.find import answer_key, extract_answer, parse_quantity
from siftline.scoring.verifiers import (
    ExactVerifier,
    MathVerifier,
    Verdict,
    get_verifier,
    verify_math,
)
from siftline.stages.verify.decide import Verify


@pytest.fixture(scope="module")
def math():
    verifier = MathVerifier(timeout=20)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,080 ", "1,080"),
        ("#### Step 1: add\n2 + 3 = 5\nSo \\boxed{5}.", "5"),  # a Markdown heading is no answer
        ("#### 5\n\nQuestion: and then?", "5"),  # a base model that runs on
        ("#### one\n#### two", "two"),
        ("\\boxed{\\frac{1}{2}} and \\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("\\boxed{3} then \\boxed{4", "3"),  # the last balanced one
        ("\\boxed{\\boxed{7}}", "7"),
        ("The answer is 4.5. Good.", "4.5"),
        ("the final answer is: **18**", "18"),
        ("Answer: x + 1\nbecause", "x + 1"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("I get \\boxed{3}\n#### 4", "4"),
        ("She has 24 clips in May and 72", None),
        ("We compute 3 + 4 = 7\n####", None),
        ("the answers are plenty: 3", None),
        ("", None),
    ],
)
def test_strict_extraction(response, expected):
    assert extract_answer(response) == expected


def test_the_last_number_is_read_only_when_asked_for():
    text = "so 12 apples, then $1,234.5 in all"
    assert extract_answer(text) is None
    assert extract_answer(text, strict=False) == "$1,234.5"
    assert extract_answer("no number", strict=False) is None


@pytest.mark.parametrize(
    "same",
    [
        ("1000", "1,000", "1000.0", "$1,000", "1000 dollars", "1e3", "1 thousand", "+1000."),
        ("-5", "\u22125", "- 5", "$-5", "-$5.00", "-5 degrees"),
        ("1/2", "0.5", ".5", "\\frac{1}{2}", "\\dfrac{2}{4}", "1/2 cup"),
        ("7/2", "3.5", "3 1/2", "3 1/2 hours"),
        ("60", "60 miles per hour", "60%", "60 \\%", "60\\text{ cm}", "60cm", "x = 60"),
        ("2 pi", "2  PI"),
    ],
)  # fmt: skip
def test_equal_answers_have_one_key(same):
    assert {answer_key(text) for text in same} == {answer_key(same[0])}


def test_different_answers_have_different_keys():
    texts = ["-5", "5", "1/2", "12", "1.2", "2 pi", "2", "5 or 6", "5 pm", "5 am", "1,00",
             "100", "1/0", "(1, 2)", "9" * 300, "9" * 301, "5 million", "x",
             "__import__('os')"]  # fmt: skip
    assert len({answer_key(text) for text in texts}) == len(texts)


@given(
    st.fractions(max_denominator=10**6), st.sampled_from(["", "$"]), st.sampled_from(["", " km"])
)
def test_a_fraction_reads_back_exactly(value, currency, unit):
    sign = "-" if value < 0 else ""
    text = f"{sign}{currency}{abs(value.numerator)}/{value.denominator}{unit}"
    quantity = parse_quantity(text)
    assert quantity is not None
    assert quantity.value == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_separators_and_trailing_zeros_change_nothing(value, zeros):
    text = f"{value:,}" + ("." + "0" * zeros if zeros else "")
    assert answer_key(text) == str(value)
    assert answer_key(str(value + 1)) != answer_key(text)


@given(st.text(max_size=80))
def test_any_text_is_read_without_an_error(text):
    assert answer_key(answer_key(text)) == answer_key(answer_key(text))
    extract_answer(text)
    extract_answer(f"#### {text}")
    extract_answer("\\boxed{" + text)


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("#### 72", "72", True),
        ("#### 1,000", "1000.0", True),
        ("#### -5", "5", False),
        ("#### 1/2", "12", False),
        ("#### 50%", "0.5", True),
        ("#### 50%", "50", True),
        ("#### 50%", "5", False),
        ("#### 5 pm", "5 am", False),
        ("\\boxed{x+1}", "1+x", True),
        ("\\boxed{x+1}", "x-1", False),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", True),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", True),
        ("\\boxed{(1,2)}", "(2,1)", False),
        ("#### Evelyn", "evelyn", True),
        ("#### red", "blue", False),
        ("#### 72", "She sold 24.\n#### 72", True),  # the reference is itself a solution
    ],
)
def test_math_verdicts(math, response, answer, correct):
    verdict = math(response, answer)
    assert verdict.correct is correct
    assert verdict.reason == ("match" if correct else "wrong_answer")


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("#### 18", "18", True),
        ("A: 18", "18", True),
        ("so\nA: 18", "#### 18", True),
        (r"\boxed{18}", "18", True),
        ("#### 18 dollars", "18", True),
        ("#### $18.00", "18", True),
        ("#### 1,800", "1800", True),
        ("#### 50%", "50", True),
        ("#### 1/2", "0.5", True),
        ("#### -5", "-5", True),
        ("#### -5", "5", False),
        ("#### 18 apples are left", "18", True),
        ("#### 18 dollars per day", "18", True),
        ("The answer is 18 dollars every day.", "18", True),
        (r"\boxed{\frac{1}{2}}", "1/2", True),
        ("#### 19", "18", False),
        ("I think 18", "18", None),
        ("A: 18\nB: 20", "18", None),
        ("#### 18.", "18", True),
        ("#### 18 years old", "18", True),
        ("#### $1,234.50", "1234.5", True),
        ("#### £18", "18", True),
        ("#### 3 1/2", "3.5", True),
        ("#### 20 percent", "20%", True),
        ("#### 18 eggs a day", "18", True),
        ("A: The total is 18", "18", True),
        ("#### 18 km/h", "18", True),
        ("#### 18", "A: 18", True),
        ("A: 18 dollars", "18", True),
        ("#### 25 cents", "25", True),
        ("#### 18 in total", "18", True),
        ("#### 18 of them", "18", True),
        ("", "18", None),
        ("#### 3 to one", "3", None),
        ("#### 18 a", "18", False),
    ],
)
def test_the_plain_function_reads_marks_units_and_trailing_words(response, answer, correct):
    assert verify_math(response, answer).correct is correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 100 ¥", "100"),
        ("#### 100¥", "100"),
        ("#### 500 ₹", "500"),
        ("#### US$18", "18"),
        ("#### USD 18", "18"),
        ("#### A$18", "18"),
        ("#### Rs. 500", "500"),
        ("#### ½", "0.5"),
        ("#### 2½", "2.5"),
        ("#### 7\u20448", "7/8"),
        ("#### 1 000", "1000"),
        ("#### 1\u00a0000", "1000"),
        ("#### 1\u202f000", "1000"),
        ("#### 18 m/s", "18"),
        ("#### 18 (since 3*6=18)", "18"),
        ("A: He has 18 apples.", "18"),
        ("The answer is: the total is 18", "18"),
    ],
)
def test_currencies_fractions_spaces_and_sentences_disprove_nothing(response, answer):
    assert verify_math(response, answer).correct is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [("#### 3 (mod 5)", "3"), ("#### 2 (x+1)", "2"), ("#### 2 1/2", "21/2"),
     ("A: He has less than 18 apples.", "18"), ("#### 5 100/3", "5100")],
)  # fmt: skip
def test_what_changes_a_number_is_not_dropped(response, answer):
    assert verify_math(response, answer).correct is not True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 18 apples left over", "18"),
        ("The answer is 18, since 3*6=18", "18"),
        ("The answer is 18 and so we are done.", "18"),
        ("A: 18 because 3*6=18", "18"),
        ("#### 20 minutes to go", "20"),
        ("#### 20 feet by noon", "20"),
        ("#### 18 (3*6)", "18"),
        ("#### 18 m^2", "18"),
        ("#### 18 m\u00b2", "18"),
        ("#### 18 L", "18"),
        ("#### 1,800 L left", "1800"),
        ("#### -18, because 3 - 21 = -18", "-18"),
        ("#### 18", "18 apples left over"),
    ],
)
def test_words_behind_the_right_number_are_read_or_left(response, answer):
    assert verify_math(response, answer).correct is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 18 boxes of 12", "18"),
        ("#### 18 out of 20", "18"),
        ("#### 18 in 20", "18"),
        ("#### 5 feet 3 inches", "5"),
        ("#### 18 or 20", "18"),
        ("#### 18, or maybe 20", "18"),
        ("#### 18 boys and 20 girls", "18"),
        ("#### 18 times as many", "18"),
        ("#### 18 less than twenty", "18"),
        ("#### 5 pm", "5"),
        ("#### 5 dozen", "60"),
        ("#### 5 dozen", "5"),
        ("#### 18 (in the end)", "19 (in the end)"),
        ("The answer is 18, because 3*6=18, or 20", "18"),
        ("The answer is 18, so that 2 are left", "18"),
    ],
)
def test_words_that_may_change_the_number_decide_nothing(response, answer):
    assert verify_math(response, answer).correct is not True
    if not answer.endswith(")"):
        assert verify_math(response, answer).correct is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 18/5", "18"),
        ("#### 18.5", "18"),
        ("#### 18 000", "18"),
        ("#### 18,000", "18"),
        ("#### 18 + 2", "18"),
        ("#### 18x", "18"),
        ("#### 18%", "19"),
        ("#### 18, 20", "18"),
        ("#### 18 apples left over", "19"),
        ("#### 18, since 3*6=18", "3"),
        ("#### 5 pm", "5 am"),
    ],
)
def test_other_numbers_stay_wrong(response, answer):
    assert verify_math(response, answer).correct is False


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-99, 99),
    st.integers(-99, 99),
    st.sampled_from(["left over", "apples left over", "because 3*6=18", "and so on", "L", "(3*6)"]),
)
def test_no_words_turn_another_number_into_the_answer(number, other, words):
    verdict = verify_math(f"#### {number} {words}", str(other))
    assert number == other or verdict.correct is not True
    assert number != other or verdict.correct is not False


def test_an_a_before_the_reasoning_marks_no_answer():
    assert verify_math("A: First we add 3 and 4.\nSo it is 7.", "7").correct is None
    assert verify_math("A: 7\nbecause 3 + 4 = 7", "7").correct is True


def test_nothing_in_a_response_is_executed(math, tmp_path):
    target = tmp_path / "made"
    for form in ("#### {}", "\\boxed{{{}}}", "The answer is {}"):
        payload = f"__import__('os').system('touch {target}')"
        assert math(form.format(payload), "x+1").correct is not True
        assert math(form.format("1"), payload).correct is not True
    assert not target.exists()


def test_missing_answers_decide_nothing(math):
    assert math("She sold 72", "72") == Verdict(None, None, "no_final_answer")
    assert math("#### 72", " ").reason == "no_reference"
    assert math("#### " + "x+" * 400, "y").reason.startswith("verifier_error")


def test_a_comparison_that_never_ends_is_a_recorded_error_and_leaves_the_next_one_working():
    verifier = MathVerifier(timeout=5)
    # Off the main thread, where math-verify's own alarm does not work.
    found = []
    work = [("#### 9^{9^{9^{9}}}", "x+1"), ("\\boxed{x+1}", "1+x")]

    def judge():
        found.extend(verifier(*pair) for pair in work)

    started = time.monotonic()
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    verifier.close()
    assert time.monotonic() - started < 60
    assert found[0].correct is None
    assert found[0].reason == "verifier_error: timeout after 5 s"
    assert found[1].correct is True


def test_a_killed_child_is_an_error_and_is_replaced():
    equivalence = Equivalence(timeout=20)
    assert equivalence("x", "x")
    equivalence._child.kill()
    equivalence._child.wait()
    with pytest.raises(EquivalenceError, match="code -9"):
        equivalence("x", "x")
    assert equivalence("x", "x")
    equivalence.close()


def test_exact_verdicts():
    exact = ExactVerifier()
    assert exact(" Strengthener.\n", "strengthener").correct is True
    assert exact('"not  True"', "not true").correct is True
    assert exact("weakener", "strengthener") == Verdict(False, "weakener", "wrong_answer")
    assert exact("", "a") == Verdict(None, None, "no_final_answer")
    assert exact("a", "").reason == "no_reference"


def test_verbatim_verdicts():
    verbatim = get_verifier("verbatim")
    assert verbatim(" getName()\r\n", "getName()").correct is True
    for other in ("getname()", "'getName()'", "getName().", "getName( )", "get\nName()"):
        assert verbatim(other, "getName()") == Verdict(False, other, "wrong_answer")
        assert verbatim(other, other).correct is True
    assert verbatim("caf\u00e9", "cafe\u0301").correct is True
    assert verbatim(" ", "a") == Verdict(None, None, "no_final_answer")
    assert verbatim("a", " ").reason == "no_reference"


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("B", "B", True),
        ("(b)", "B", True),
        ("B. Paris", "(B)", True),
        ("**B**", "B", True),
        ("B) because it rains", "B", True),
        ("It rains, so the answer is (C).", "C", True),
        ("#### D", "D", True),
        ("\\boxed{A}", "A", True),
        ("Option C", "C", True),
        ("C", "B", False),
        ("Answer: A", "D", False),
        ("A dog", "A", None),
        ("B or C", "B", None),
        ("(B) or (C)", "B", None),
        ("I think it rains", "B", None),
        ("", "B", None),
        ("B", "Paris", None),
        ("A: Paris", "A", True),
        ("A: Paris", "A: Paris", True),
        ("A: Paris", "B", False),
        ("A: Let's think. The answer is C.", "C", True),
        ("A: Let's think. The answer is C.", "A", False),
        ("A: The capital is Paris, so the answer is C", "C", True),
        ("A: #### C", "C", True),
        ("A: B", "B", True),
        ("A: (C)", "C", True),
        ("A: Let's think. Paris it is.", "B", None),
        ("B. is wrong. It must be C.", "C", None),
        ("B. is wrong. It must be C.", "B", None),
        ("A) Paris\nB) Rome", "B", None),
    ],
)
def test_choice_verdicts(response, answer, correct):
    assert get_verifier("choice")(response, answer).correct is correct


@given(st.text(max_size=40), st.text(max_size=8))
def test_any_text_gets_a_verdict_on_its_letter(response, answer):
    verdict = get_verifier("choice")(response, answer)
    assert verdict.correct in (True, False, None)
    assert verdict.extracted is None or len(verdict.extracted) == 1


def test_verifiers_by_name():
    assert isinstance(get_verifier("math"), MathVerifier)
    own = get_verifier("siftline.scoring.verifiers:ExactVerifier")
    assert own("Paris.", "paris") == ExactVerifier()("Paris.", "paris")
    for name in ("maths", "no.such.module:x", "siftline.scoring.verifiers:missing",
                 "siftline.scoring.verifiers:LONGEST_EXPRESSION"):  # fmt: skip
        with pytest.raises(ValueError, match="verifier"):
            get_verifier(name)
    with pytest.raises(ValueError, match="timeout"):
        MathVerifier(timeout=0)


FRAME = pl.DataFrame(
    {
        "id": ["a", "b", "c", "d", "e", "f"],
        "answer": ["1", "1", "1", "1", None, "1"],
        "answer_from": [*["independent"] * 3, "response", None, "independent"],
        "correct": [True, False, None, False, None, None],
        "extracted": ["1", "2", None, "2", None, "x^x"],
    }
)  # fmt: skip


def test_the_gate_holds_rows_to_independent_answers_only():
    selection = select(Verify(), FRAME)
    reasons = dict(selection.decisions.select("id", "reason").iter_rows())
    assert reasons == {
        "a": None, "b": "wrong_answer", "c": "no_final_answer", "d": None, "e": None,
        "f": "verifier_error",
    }  # fmt: skip
    assert selection.facts["checked"] == 4
    assert selection.facts["without_independent_answer"] == 2
    assert not selection.vacuous


def test_the_gate_can_keep_rows_without_a_final_answer():
    kept = select(Verify(no_final_answer="keep"), FRAME).kept.to_list()
    assert kept == ["a", "c", "d", "e"]
    with pytest.raises(ValueError, match="no_final_answer"):
        Verify(no_final_answer="drop")


SAID = FRAME.with_columns(
    said=pl.Series(
        ["match", "wrong_answer", "no_final_answer", None, None, "unreadable: two answers"]
    )
)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("unreadable: no library numpy", "unreadable"),
        ("no_reference", "unreadable"),
        ("verifier_error: timeout after 5 s", "verifier_error"),
        ("no_final_answer", "no_final_answer"),
        ("a reason of one's own", "unreadable"),
    ],
)
def test_an_open_verdict_has_an_outcome_of_its_own(said, outcome):
    """Never a mismatch; removed by default, kept where the recipe says so; counted either way."""
    frame = SAID.with_columns(
        said=pl.when(pl.col("id") == "f").then(pl.lit(said)).otherwise(pl.col("said"))
    )
    removed = select(Verify(), frame)
    reasons = dict(removed.decisions.select("id", "reason").iter_rows())
    assert reasons["f"] == outcome
    assert removed.facts["removed"][outcome] == sum(r == outcome for r in reasons.values())
    assert removed.facts["kept_open"] == {}
    kept = select(Verify(open="keep", no_final_answer="keep"), frame)
    assert kept.kept.to_list() == ["a", "c", "d", "e", "f"]
    assert kept.facts["removed"] == {"wrong_answer": 1}
    assert sum(kept.facts["kept_open"].values()) == 2
    assert kept.facts["checked"] == removed.facts["checked"] == 4


def test_open_rows_are_kept_or_removed_apart_from_those_without_an_answer():
    assert select(Verify(open="keep"), SAID).kept.to_list() == ["a", "d", "e", "f"]
    assert select(Verify(no_final_answer="keep"), SAID).kept.to_list() == ["a", "c", "d", "e"]
    with pytest.raises(ValueError, match="open must be remove or keep, not 'fail'"):
        Verify(open="fail")


def test_the_report_says_what_became_of_open_rows():
    from siftline.stages.verify import notes

    facts = {"checked": 9, "unreadable": 3, "wrong_answer": 2, "kept_open": {"no_final_answer": 1}}
    assert notes(Stage("verify", "verify", None), facts) == [
        "verify: of 9 rows checked, 3 can't be read (removed), 1 have no final answer (kept): open "
        "verdicts."
    ]
    assert (
        notes(Stage("verify", "verify", None), {"checked": 9, "wrong_answer": 2, "kept_open": {}})
        == []
    )


def test_the_gate_does_not_depend_on_order_and_says_when_it_is_vacuous():
    shuffled = FRAME.sample(fraction=1.0, shuffle=True, seed=3)
    assert select(Verify(), shuffled).decisions.equals(select(Verify(), FRAME).decisions)
    assert select(Verify(), FRAME.filter(pl.col("id").is_in(["d", "e"]))).vacuous


def test_only_a_reference_may_be_rounded(math):
    assert math("#### 1/3", "0.333333").correct is True
    assert math("#### 0.333333", "1/3").correct is False


def test_a_verifier_that_looks_for_no_step_says_the_same_otherwise():
    full, plain = get_verifier("math"), get_verifier("math", steps=False)
    for response in ("2 + 2 = 5, 5 * 2 = 10\n#### 10", "#### 8", "no answer here"):
        found, other = full(response, "8"), plain(response, "8")
        assert replace(found, first_error=None, last_right=None) == other
    assert full("2 + 2 = 5, 5 * 2 = 10\n#### 10", "8").first_error is not None
