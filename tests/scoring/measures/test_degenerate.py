"""Degenerate responses: what is found, and what is spared."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.measures.degenerate import (
    DUPLICATE_NGRAMS,
    LEAST_WORDS,
    NGRAM_LENIENCY,
    _repeated_share,
    degenerate,
)

DATA = os.environ.get("SIFTLINE_TEST_DATA")
ASKED = "How many apples are left when Tom has eaten three of the ten on the table?"
VARIED = (
    "Tom starts with ten apples on the table. He eats three of them before lunch. "
    "That leaves ten minus three, which is seven. So there are seven apples left. "
)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "7",
        "Paris",
        "the",
        "#### 7",
        "Seven apples are left",
        "Tom eats 3.\nSo 10 - 3 = <<10-3=7>>7 are left\n#### 7",
        "So it is \\boxed{\\frac{1}{2}}",
        "```python\nx = 1\n```",
        "Here:\n```python\nx = [\n```",
        "- apples\n- pears\n- plums",
        "Who did Internet2 partner with",
        VARIED + "So the answer is yes.",
        VARIED,
        "no no no no no",
        "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
        "He said: \u201cYes, that is so.\u201d",
        "Q. E. D.",
        "2 + 2 = 4",
        "The answer is **18**",
        "So x = **5**",
        "**The answer is 18**",
        "It is *really*",
        "It is __really__",
        "It is ***18***",
        "Use the language C++",
        "an A+",
        "V*",
        "It is for ages 18+",
        "**It is so,\nand not otherwise**",
        "The correct answer is a",
        "I would choose option a",
        "So we have found it: a",
    ],
)
def test_sound_responses_are_spared(response):
    assert degenerate(response, ASKED) is None


@pytest.mark.parametrize(
    "response",
    [
        "```python\nx = 1\n",
        "So it is \\boxed{\\frac{1}{2}",
        "So 10 - 3 = <<10-3=",
        "So the answer is 10 +",
        "So we get 3 * 4 *",
        "So we get 3 + 4+",
        "So it is **10** +",
        "So it is **10,",
        "Tom eats on a",
        "We buy apples, pears,",
        "Tom eats three of the",
        "The sum (3 + 4) is the number (",
        VARIED + "After that he takes some mor",
        "Tom has ten apples.\nHe eats three of them.\nSo what is left on the tab",
    ],
)
def test_cut_responses_are_truncated(response):
    assert degenerate(response, ASKED) == "truncated"


@pytest.mark.parametrize(
    "response",
    [
        VARIED + "I think so. " * 6,
        VARIED + "yes " * 12,
        "So 7. " + "Let me check again. Ten minus three is seven. " * 5 + "Let me check",
        "\n".join(["We have ten apples and eat three of them."] * 3 + ["So it is seven."]
                  + ["We have ten apples and eat three of them."] * 3),
        "\n".join(f"{line}\nThe same line of words stands here every second time."
                  for line in ("One of ten.", "Two of ten, then.", "Three.", "Four, at last.",
                               "Five, and the end.")),
    ],
)  # fmt: skip
def test_circling_responses_are_repetitive(response):
    assert degenerate(response, ASKED) == "repetitive"


GREEK = "".join(map(chr, range(0x3B1, 0x3CA))) + "."
CHINESE = "".join(chr(0x4E00 + 37 * n) for n in range(40)) + "."
JAPANESE = "".join(map(chr, range(0x304A, 0x3070))) + CHINESE[:3]
RUSSIAN = "".join(map(chr, range(0x430, 0x450))) + "."


@pytest.mark.parametrize(
    ("response", "prompt", "reason"),
    [
        (CHINESE, ASKED, "wrong_language"),
        (RUSSIAN, ASKED, "wrong_language"),
        (GREEK, ASKED, "wrong_language"),
        (VARIED, CHINESE, "wrong_language"),
        (VARIED + CHINESE[:6], ASKED, None),
        (CHINESE, CHINESE, None),
        (CHINESE, JAPANESE, None),  # one script family
        (CHINESE[:8], ASKED, None),  # not enough letters
        (CHINESE, "7 + 3?", None),
        (RUSSIAN, f"Translate into Russian ({RUSSIAN[:8]}): seven apples", None),
        (f"```python\n{'print(total_number_of_apples)' * 3}\n```", CHINESE, None),
        ("$\\alpha + \\beta + \\gamma + \\delta$", CHINESE, None),
        ("Il reste sept pommes, bien s\u00fbr.", ASKED, None),  # another language, the same script
    ],
)
def test_the_script_has_to_be_the_prompts(response, prompt, reason):
    assert degenerate(response, prompt) == reason


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(2, 10))
def test_the_repeated_share_is_what_counting_gives(words, n):
    """Against the definition: positions inside an n-gram whose words stand earlier as well."""
    inside = {
        i + k
        for i in range(len(words) - n + 1)
        if any(words[j : j + n] == words[i : i + n] for j in range(i))
        for k in range(n)
    }
    expected = len(inside) / len(words) if words else 0
    assert _repeated_share(words, n) == expected


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab .\n`\\boxed{}<>=\u4e00\u0431", max_size=80), st.text(max_size=30))
def test_any_text_is_judged_and_always_the_same(response, prompt):
    found = degenerate(response, prompt)
    assert found in (None, "truncated", "repetitive", "wrong_language")
    assert degenerate(response, prompt) == found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["red", "blue", "old", "new", "tree"]), min_size=3, max_size=9,
                unique=True), st.integers(5, 9))  # fmt: skip
def test_a_loop_is_found_whatever_it_says(words, rounds):
    sentence = " ".join(words) if len(set(words)) > 1 else "red tree"
    assert degenerate(f"It begins well. {f'{sentence}. ' * rounds}", ASKED) == "repetitive"


@pytest.mark.skipif(not DATA, reason="SIFTLINE_TEST_DATA is not set")
def test_gsm8k_answers_are_spared_and_planted_faults_are_found():
    folder = Path(DATA) / "gsm8k"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text("utf-8").splitlines()]
    rows += [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()][
        :700
    ]
    hits = Counter(degenerate(row["answer"], row["question"]) for row in rows)
    assert hits == {None: len(rows)}
    draws = random.Random(1)
    sample = draws.sample(rows, 100)
    for row in sample:
        solution, _, final = row["answer"].partition("\n#### ")
        line = draws.choice(solution.split("\n"))
        assert degenerate(f"{solution}\n" + f"{line}\n" * 6, row["question"]) == "repetitive"
        assert degenerate(f"{solution}\n\\boxed{{{final}", row["question"]) == "truncated"
        assert degenerate(f"{CHINESE}\n#### {final}", row["question"]) == "wrong_language"


def test_the_longest_gap_to_a_threshold_is_stated_for_short_texts():
    few = " ".join(["seven apples are left here"] * 4)
    assert len(few.split()) < LEAST_WORDS
    assert degenerate(few + ".", ASKED) is None, "four rounds of a short text are no loop"
    assert max(DUPLICATE_NGRAMS.values()) * NGRAM_LENIENCY < 1


def test_long_texts_end():
    for text in ("a " * 30_000, "\\boxed{" * 5000, "```" * 5000, "<<" * 9000, "x" * 200_000,
                 "a. B" * 9000):  # fmt: skip
        degenerate(text, text)


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="SIFTLINE_TEST_DATA is not set")
def test_all_answers_at_hand_are_spared():
    """The figures of docs/verifiers.md."""
    hits = {}
    for folder, prompt, answer in [
        ("gsm8k", "question", "answer"),
        ("natural_instructions", "input_col", "output_col"),
    ]:
        rows = [
            json.loads(line)
            for path in sorted((Path(DATA) / folder).glob("*.jsonl"))
            for line in path.read_text("utf-8").splitlines()
        ]
        found = Counter(degenerate(row[answer], row[prompt]) for row in rows)
        hits[folder] = (len(rows), len(rows) - found[None])
    assert hits == {"gsm8k": (8792, 0), "natural_instructions": (69148, 2)}


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="SIFTLINE_TEST_DATA is not set")
def test_how_many_cut_answers_are_seen():
    """The recall of docs/verifiers.md, which is low: a cut between two steps leaves no mark."""
    draws = random.Random(1)
    found = Counter()
    for line in (Path(DATA) / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        answer = row["answer"]
        cut = answer[: draws.randrange(len(answer) // 4, len(answer) - 5)]
        found[degenerate(cut, row["question"])] += 1
    assert found == {None: 954, "truncated": 365}
