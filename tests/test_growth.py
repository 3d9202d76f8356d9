"""What a function that reads a row's text takes for four times the text: no one row stalls a run.

Processor time of this thread, the least of several: other work on the machine takes none of it.
Linear is a factor of 4, quadratic of 16; up to 9 is let through, for caches and tables that grow.
"""

import json
import time

import pyarrow as pa
import pytest

from siftline.ingest.layouts import convert, plan_for
from siftline.ingest.parse import nesting_fault, record_fault
from siftline.ingest.source import Source
from siftline.kernels.sets.shingles import char_shingles, word_grams
from siftline.kernels.text.textgrams import guards, quantities
from siftline.kernels.text.words import mtld, plain, words
from siftline.kernels.text.words import mtld_words as words_of
from siftline.kernels.text.words import words_of as worded
from siftline.rows.schema import make_row, message, text_view
from siftline.scoring.answers.find import find_answers
from siftline.scoring.answers.reasoning import blocks
from siftline.scoring.answers.steps import trace
from siftline.scoring.measures.consistency import word_overlap
from siftline.scoring.measures.degenerate import degenerate
from siftline.scoring.verifiers import get_verifier
from siftline.scoring.verifiers.instruction_checks import without_marks
from siftline.stages import canaries as planting

CHARS = 12_000
NOTHING_S = 0.0015
"""Time for the longer text that is no matter: it would be seconds for the largest record."""
FACTOR, MOST_FACTOR = 4, 9.0

REPEATED = [
    "a", " ", "\n", "a ", "the answer is 42. ", "1", "1 ", "-", "- ", "-1", "+ 1 ", ",", "1,", "1.",
    ".", ". ", "...\n", "A: \n", "=", "= ", "1=", "1 = 1\n", "$", "$$", "$a\n", "$$a ", "*", "*a ",
    "**a ", "_", "_a ", "*a* ", "`", "``` ", "```\n", "```a\nb\n```\n", "~~~\n", "<", "<<", "<<1=",
    "<<1=1>>", ">>", "(", ")", "[", "{", "{}", "\\", "\\boxed{", "\\boxed{1}", "\\frac{", '"', "'",
    "a'", "a.", "#### 1\n", "# ", "- a\n", "|", "| a ", "http://", "https://a ", "<think>",
    "</think>", "\u0301", "\u0316\u0301", "e\u0301", "\u0f71\u0f72", "\u200d", "\u00ad", "漢", "ก",
    "é", "🙂", "İ", "ﷺ", "\x00", "\t", "\r\n", "\u2028", "5 % ", "1/2 ", "a\u2019", "a\n\n",
]  # fmt: skip
"""What a text is made of, again and again; each is also tried between two words."""


def blocks_apart(size):
    return "".join(f"```\nx{i}\n```\n" for i in range(size // 12))


def numbers_apart(size):
    return " ".join(map(str, range(size // 6)))


def texts_of(unit):
    return lambda size: "go " + (unit * (size // len(unit) + 1))[:size] + " on"


SHAPES = {f"{unit!r}": texts_of(unit) for unit in REPEATED}
SHAPES |= {"many blocks": blocks_apart, "many numbers": numbers_apart}


def talk(text, where="both"):
    sides = {"prompt": (text, "42"), "response": ("6*7?", text), "both": (text, text)}[where]
    return [message("user", sides[0]), message("assistant", sides[1])]


def one_row(text):
    """The same draws whatever the text: they hang on the id."""
    made = make_row(talk(text, "response"))
    return {**made, "id": "5" * 40, "answer": "42", "source": "s"}


def converted(text):
    record = {"prompt": text, "completion": text}
    return convert(record, plan_for(Source("x.jsonl"), list(record), "x"))


def turned(text):
    record = {"messages": json.dumps(talk(text))}
    return convert(record, plan_for(Source("x.jsonl"), list(record), "x"))


PLANTED = [
    getattr(planting, name)
    for name in ("swapped_answer", "truncated", "looped", "one_number", "near_copy", "leaked")
]
OTHER = one_row("There are 12 apples and 30 pears. It is 42.")

READERS = {
    "plain, words": lambda text: words(plain(text)),
    "quantities": lambda text: quantities(worded([text])),
    "guards": lambda text: guards(worded([text])),
    "char_shingles": lambda text: char_shingles([text], 5),
    "word_grams": lambda text: word_grams([text], 3),
    "mtld": lambda text: mtld(words_of(text)),
    "degenerate": lambda text: degenerate(text, "What is six times seven, my friend?"),
    "degenerate prompt": lambda text: degenerate("It is forty two, my friend.", text),
    "fences": blocks,
    "answers": find_answers,
    "exact": lambda text: get_verifier("exact")(text, "42"),
    "choice": lambda text: get_verifier("choice")(text, "B"),
    "counts": without_marks,
    "steps": trace,
    "overlap": lambda text: word_overlap(text, text + " on"),
    "row": lambda text: make_row(talk(text)),
    "text view": lambda text: text_view(pa.Table.from_pylist([make_row(talk(text))])),
    "convert": converted,
    "convert turns": turned,
    "nesting": lambda text: nesting_fault(text.encode()),
    "record": lambda text: record_fault({"a": [text, text.split(" ")]}),
    "planting": lambda text: [defect(one_row(text), OTHER) for defect in PLANTED],
}


def seconds(call, text):
    start = time.thread_time()
    call(text)
    return time.thread_time() - start


def growth(call, shape):
    """Least processor time for a text, and for one four times as long.

    Measured again while it looks bad: a pause or a cold cache is not there every time.
    """
    texts = shape(CHARS), shape(FACTOR * CHARS)
    large = seconds(call, texts[1])
    if large < NOTHING_S:
        return large, large
    small = seconds(call, texts[0])
    for _ in range(4):
        if large <= MOST_FACTOR * small or large > 10:
            break
        small = min(small, seconds(call, texts[0]))
        large = min(large, seconds(call, texts[1]))
    return small, large


@pytest.mark.parametrize("name", READERS)
def test_time_grows_as_the_text_does(name):
    call, bad = READERS[name], []
    call("Warm up: 6 * 7 = 42.")
    for shape in SHAPES:
        small, large = growth(call, SHAPES[shape])
        if large > MOST_FACTOR * small:
            bad.append(f"{shape}: {small:.4f} s, and {large:.4f} s for {FACTOR} times the text")
    assert not bad, "\n".join(bad)


def test_the_measure_tells_quadratic_from_linear():
    def squared(text):
        return [j for i in range(0, len(text), 40) for j in range(0, i, 40)]

    small, large = growth(squared, texts_of("a"))
    assert large > MOST_FACTOR * small
    small, large = growth(lambda text: [c.isalpha() for c in text], texts_of("a"))
    assert large <= MOST_FACTOR * small
