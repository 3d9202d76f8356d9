import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from gsm8k_inputs import (
    FORMS,
    SOURCES,
    Solved,
    generate,
    truncate,
    variants,
    write,
    wrong_step,
)
from gsm8k_sums import decimal_text, evaluate
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from siftline.demo.problems import Dice
from siftline.scoring.answers.find import answer_key, extract_answer


def question(i):
    """A question in the form of GSM8K, made here: two calculations, the second uses the first."""
    a, b, c = 3 + i % 17, 2 + i % 5, 4 + i % 9
    total = a * b + c
    body = (
        f"She packs {a}*{b} = <<{a}*{b}={a * b}>>{a * b} nuts.\n"
        f"With {c} more she has {a * b}+{c} = <<{a * b}+{c}={total}>>{total} nuts."
    )
    return {"question": f"No {i}: Ann packs {a} bags of {b} nuts and finds {c}. How many nuts?",
            "answer": f"{body}\n#### {total}"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    for name, first, last in (("train", 0, 400), ("test", 400, 450)):
        lines = [json.dumps(question(i)) for i in range(first, last)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    generate(folder / "in", folder / "truth", seed=0, data=str(data), dev=30)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_arguments_same_bytes(made, data, tmp_path):
    generate(tmp_path / "in", tmp_path / "truth", seed=0, data=str(data), dev=30)
    for name in (
        "in/pool.jsonl",
        "in/dev.jsonl",
        "in/test.jsonl",
        "in/corpus.jsonl",
        "truth/rows.jsonl",
    ):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_four_rows_a_question_each_what_the_truth_says(made):
    truth = read(made / "truth" / "rows.jsonl")
    assert len(truth) == 4 * (400 - 120 - 30)
    assert Counter(row["defect"] for row in truth) == {
        None: len(truth) // 2, "wrong_vs_reference": len(truth) // 4, "truncated": len(truth) // 4,
    }  # fmt: skip
    for row in truth:
        said = extract_answer(row["response"])
        if row["defect"] == "truncated":
            assert said is None
        else:
            right = answer_key(said) == answer_key(row["answer"])
            assert right == (row["defect"] is None)


def test_test_questions_are_in_no_other_file_and_base_questions_not_in_the_pool(made):
    asked = {
        n: {r["question"] for r in read(made / "in" / f"{n}.jsonl")}
        for n in ("pool", "dev", "test")
    }
    texts = [line["text"] for line in read(made / "in" / "corpus.jsonl")][1:]
    asked["base"] = {text.removeprefix("Question: ").split("\n")[0] for text in texts}
    assert {name: len(questions) for name, questions in asked.items()} == {
        "pool": 250, "dev": 30, "test": 50, "base": 120,
    }  # fmt: skip
    assert len(set().union(*asked.values())) == 450
    assert Counter(text[-1] for text in texts if "Proposed answer:" in text).keys() == {"A", "B"}


def test_sources_do_not_give_the_defect_away(made):
    truth = read(made / "truth" / "rows.jsonl")
    table = Counter((row["source"], str(row["defect"])) for row in truth)
    kinds = sorted({kind for _, kind in table})
    assert chi2_contingency([[table[s, k] for k in kinds] for s in SOURCES]).pvalue > 1e-3
    order = [str(row["defect"]) for row in truth]
    half = len(order) // 2
    halves = [[part.count(k) for k in kinds] for part in (order[:half], order[half:])]
    assert chi2_contingency(halves).pvalue > 1e-3


SOLVED = Solved(
    "How much?",
    "He pays 2*3 = $<<2*3=6>>6.\nHalf of it is 6/2 = <<6/2=3>>3.\nIn all 6 + 3 = <<6+3=9>>9.",
    "9",
)


def test_an_error_is_carried_through_every_later_step():
    for identity in range(40):
        body, answer = wrong_step(SOLVED, Dice(0, "test", str(identity)))
        marks = re.findall(r"<<([^=]*)=([^>]*)>>(\d[\d.]*\d|\d)", body)
        assert answer != "9"
        assert marks[-1][1] == answer
        assert all(value == shown for _, value, shown in marks)
        wrong = [m for m in marks if evaluate(m[0]) != Fraction(m[1])]
        assert len(wrong) == 1  # one calculation is false, the rest follow from it


def test_a_solution_without_calculations_still_gets_a_wrong_answer():
    body, answer = wrong_step(Solved("q", "He has 12.", "12"), Dice(0, "test", "x"))
    assert answer != "12"
    assert body == f"He has {answer}."


def test_forms_keep_steps_and_answer():
    for form in FORMS:
        text = write(SOLVED.body, SOLVED.answer, form)
        assert answer_key(extract_answer(text)) == "9"
        assert ("<<" in text) == (form == "original")
        assert extract_answer(truncate(text, Dice(0, "test", form))) is None
    rows = list(variants(SOLVED, 0))
    assert len({row.id for row in rows}) == 4
    assert {row.source for row in rows} == set(SOURCES)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=6))
def test_sums_agree_with_python(parts):
    formula = "7" + "".join(f" {op} ({n}+1)" for op, n in parts)
    value, term = [Fraction(7)], Fraction(1)
    for op, n in parts:
        term = Fraction(n + 1)
        if op == "*":
            value[-1] *= term
        else:
            value.append(term if op == "+" else -term)
    assert evaluate(formula) == sum(value)


def test_sums_refuse_what_is_not_a_sum():
    assert evaluate("20/100*25") == 5
    assert evaluate("50%*8") == 4
    assert evaluate("-(2+3)x2") == -10
    assert evaluate("1,000 / 8") == 125
    for text in (
        "",
        "1/0",
        "2+",
        "(2",
        "2)",
        "a+1",
        "2**3**9",
        "__import__('os')",
        "1+" * 200 + "1",
    ):
        assert evaluate(text) is None
    numbers = [Fraction(2), Fraction(1, 4), Fraction(1, 10), Fraction(1, 3), Fraction(-1, 2)]
    assert [decimal_text(number) for number in numbers] == ["2", "0.25", "0.1", None, "-0.5"]


def test_bad_input_is_refused_in_one_line(data, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        generate(tmp_path / "in", tmp_path / "truth", seed=0, data=str(tmp_path))
    with pytest.raises(ValueError, match="lies in"):
        generate(tmp_path / "in", tmp_path / "in", seed=0, data=str(data))
    with pytest.raises(ValueError, match="raise limit"):
        generate(tmp_path / "in", tmp_path / "truth", seed=0, data=str(data), limit=5)
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "no mark"}\n')
    with pytest.raises(ValueError, match="line 1 is not a GSM8K row"):
        generate(tmp_path / "in", tmp_path / "truth", seed=0, data=str(tmp_path))
