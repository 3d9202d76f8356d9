# ruff: noqa: RUF001
"""What a word is: compiled code against plain Python and UAX #29, and what it tells apart."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siftline.deduplication.engine import deduplicate
from siftline.kernels.sets.shingles import word_grams_reference
from siftline.kernels.text.codepoints import (
    EXPANDS,
    GROWTH,
    LIMIT,
    SIGN,
    SOLO,
    fold_character,
    fold_reference,
    tables,
)
from siftline.kernels.text.textgrams import guards, quantities, shingles_reference
from siftline.kernels.text.words import numbers, words, words_of
from siftline.kernels.text.words_reference import words_reference
from siftline.rows.schema import make_row, message
from siftline.rows.selection import select
from siftline.stages.decontamination.decide import Decontamination
from siftline.stages.duplicates.decide import Duplicates

CASES = Path(__file__).parents[1] / "cases"
SCRIPTS = [
    *["Latin", "Greek", "Cyrillic", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil", "Telugu"],
    *["Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Georgian", "Hangul", "Ethiopic"],
    *["Hiragana", "Katakana", "Han", "Javanese", "Mongolian"],
]
EVERY = [chr(point) for point in range(LIMIT) if not 0xD800 <= point < 0xE000]
LETTERS = {s: regex.findall(rf"\p{{Script={s}}}", "".join(EVERY)) for s in SCRIPTS}
ASCII = st.sampled_from("aabxyzAB0123459   ..,,::;;''__--!!++*/^<=>|~&%#$@\\([{)]}\"?`\n\t\0")
ODD_PARTS = [
    *[
        "\u0301",
        "\u0323",
        "e\u0301",
        "\u1112\u1161\u11ab",
        "\u093c",
        "\u064b\u0651",
        "\u05b8\u05bc",
    ],
    *["\u3099", "\u0338", "\u200d", "\u200b", "\u00ad", "\ufe0f", "\u0640", "\u0345", "\u0344"],
    *["…", "—", "–", "−", "’", "“", "×", "÷", "½", "²", "³", "⁻", "≠", "≤", "€", "→", "🙂", "ﬁ"],
    *["ß", "İ", "Ａ", "５", "٣", "३", "٫", "㈱", "㌔", "ﷺ", "¨", "´", "√", "π", "。", "、", "word"],
]
ODD = st.sampled_from(ODD_PARTS)
OF_SCRIPT = st.sampled_from(SCRIPTS).flatmap(lambda s: st.sampled_from(LETTERS[s]))
TEXT = st.lists(ASCII | ODD | OF_SCRIPT | st.characters(codec="utf-8"), max_size=50).map("".join)


# ---- one definition ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=400)
@given(st.lists(TEXT, max_size=4))
@example(["(2 + 3) * 4 - x", "\ud800", "", "a" * 70 + "-5", " " * 40 + "(" * 30 + "+" * 70])
def test_any_text_is_cut_as_the_reference_cuts_it(texts):
    assert words_of(texts).strings() == [" ".join(words_reference(text)) for text in texts]


@settings(deadline=None, max_examples=200)
@given(TEXT)
@example("a\u2270b \u2271 \u0385\u1fc1")
def test_normal_forms_are_one_text(text):
    """Composed or not, in full width or not: the same words, by Unicode's own normalisation."""
    for form in ("NFC", "NFD"):
        assert words(unicodedata.normalize(form, text)) == words(text)


def test_the_fold_is_unicodes_but_for_what_is_listed():
    """Letters of every script: NFKC without case, digits as ASCII."""
    for char in EVERY:
        if not char.isalpha() or unicodedata.category(char) == "Lm":
            continue
        folded = fold_character(char)
        theirs = unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", char).casefold())
        if "\u0345" not in unicodedata.normalize("NFD", char) and len(theirs) == 1 and folded:
            assert folded == unicodedata.normalize("NFKC", theirs.casefold()), hex(ord(char))


def test_no_fold_outgrows_its_room():
    classes = tables().classes
    for point in np.flatnonzero(classes == EXPANDS).tolist():
        parts = fold_character(chr(point))
        alone = sum(classes[ord(part)] in (SOLO, SIGN) and ord(part) >= 0x80 for part in parts)
        size = len(parts.encode()) + alone + (alone == 0)
        assert size <= GROWTH * len(chr(point).encode()), hex(point)


# Signs, kana, Hebrew quotes, colons and lone underscores go by our own rules; the rest by UAX #29.
SPACED = [s for s in SCRIPTS if s not in ("Thai", "Lao", "Khmer", "Myanmar", "Hiragana")]
UAX29 = st.lists(
    st.sampled_from("aabz019   ..,,;'__?\"")
    | st.sampled_from([s for s in SPACED if s not in ("Katakana", "Han", "Javanese")]).flatmap(
        lambda s: st.sampled_from(LETTERS[s])
    ),
    max_size=40,
).map("".join)


@settings(deadline=None, max_examples=400)
@given(UAX29)
def test_words_are_those_of_uax29(text):
    folded = fold_reference(text).replace("\0", " ").replace('"', " ")
    letters = regex.compile(r"[\p{L}\p{N}]")
    kept = r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}\p{WB=Numeric}\p{WB=Extend}\p{Co}_.,;' ]"
    if not regex.fullmatch(rf"{kept}*", folded) or regex.search(
        r"[ .,;'_0-9]\p{WB=Extend}|^\p{M}|\p{Hebrew}\p{M}*'", folded
    ):
        return  # symbols, or marks on nothing or on digits, which are letters here
    cut = [part.strip("_") for part in regex.split(r"(?wV1)\b", folded)]
    ours = [word for word in words_reference(text) if letters.search(word)]
    assert ours == [part for part in cut if letters.search(part)]


# ---- what makes a difference, and what does not --------------------------------------------------

APART = [
    ["12 + 7", "12 * 7", "12 - 7", "12 / 7", "12 7", "127", "12 ^ 7", "12.7", "12,7", "12:7"],
    ["x > 5", "x < 5", "x >= 5", "x <= 5", "x = 5", "x == 5", "x != 5", "x 5"],
    ["C", "C#", "C++", "F#", "F", "c*"],
    [".NET", "NET", "Node.js", "Node js", "Nodejs", "ASP.NET"],
    ["5", "-5", "5%", "$5", "€5", "£5", "5!", "+5", ".5", "5°", "5‰"],
    ["a && b", "a || b", "a & b", "a | b", "a b", "!a && b"],
    ["(2 + 3) * 4", "2 + 3 * 4", "2 + (3 * 4)", "(2 * 3) + 4"],
    ["-(5 + 3)", "-5 + 3", "(5 + 3)", "2 * (-5)", "2 * (5)"],
    ["x^2", "x2", "x^3", "x^-2"],
    ["3.10", "3.1", "3 10", "310", "3,10"],
    ["10:30", "10.30", "1030", "10-30"],
    ["2024-01-02", "2024-02-01", "2024/01/02", "20240102"],
    ["x - y", "x + y", "x y", "x / y", "y - x"],
    ["foo_bar", "foo bar", "foobar"],
    ["Na+", "Na", "Cl-", "Cl", "H2O", "H2O2"],
    ["😀", "😢", "👍", "→", "←", "⇒", "🇫🇷", "🇩🇪"],
    ["₹5", "¥5", "5 ₿", "5"],
    ["if a == b: c", "if a != b: c", "if a >= b: c"],
    ["√(x + 1) - 2", "√x + 1 - 2"],
    ["I", "II", "III", "IV"],
    ["लड़का जाता है", "लड़की जाती है"],
    ["ভাত", "ভিত", "ভূত"],
    ["סֵפֶר", "סַפָּר"],
    ["كَتَبَ", "كُتِبَ"],
    ["கல்", "கள்", "கால்"],
    ["ใกล้", "ไกล"],
    ["ខ្មែរ", "ខ្មារ"],
    ["漢字", "汉字"],
]
# Not seen by the number guard, so that short questions that differ in these alone may be near.
APART_AS_WORDS = [
    ["f'(x)", "f(x)", "f''(x)", "f'''(x)"],
    ["y'' + y = 0", "y' + y = 0", "y + y = 0", "y + y' = 0"],
    ["(fg)'(x)", "(fg)(x)", "θ'(t)", "θ(t)"],
    ["y'", "y", "y''"],
    ["n!", "n", "n!!", "2n!", "2n"],
    ["5!!", "5!", "5"],
    ["the value of k!, then", "the value of k, then"],
    ["3 + x!", "3 + x"],
    ["[2,3)", "(2,3]", "[2,3]", "]2,3]", "]2,3["],
    ["[2, 3)", "(2, 3]", "(2, 3)", "[2, 3["],
    ["(-∞, 3]", "[-∞, 3)", "(-∞, 3)"],
    ["x ∈ [a, b)", "x ∈ (a, b]", "x ∈ ]a, b]"],
    ["[1,000, 2,000)", "(1,000, 2,000]"],
    ["\\left[0,2\\pi\\right)", "\\left(0,2\\pi\\right]"],
    ["[start, end)", "(start, end]"],
]
ALIKE = [
    [
        "Name the capital.",
        "name the capital",
        "NAME  THE\n capital!",
        "Name the capital?",
        '"Name" the capital',
    ],
    ["it's", "it’s", "It‘s", "IT＇S"],
    ["“quoted”", '"quoted"', "«quoted»", "'quoted'", "„quoted“"],
    ["3 − 4", "3 - 4", "3-4", "3 – 4", "３－４", "3 -4"],
    ["3 × 4", "3*4", "3 ⋅ 4", "3 ∗ 4"],
    ["6 ÷ 2", "6/2", "６／２", "6 ∕ 2"],
    ["x ≤ 5", "x <= 5", "x<=5"],
    ["well—known", "well-known", "well known", "well – known"],
    ["café", "cafe\u0301", "CAFÉ", "ｃａｆé"],
    ["x²", "x^2", "x ^ 2"],
    ["H₂O", "H2O", "h2o"],
    ["½", "1/2", "1 / 2"],
    ["٣ + ٤", "3 + 4", "३ + ४", "３＋４"],
    ["ﬁne", "fine", "FINE"],
    ["Straße", "STRASSE", "strasse"],
    ["한국어", unicodedata.normalize("NFD", "한국어")],
    ["か\u3099", "が", "ｶ\uff9e".translate({ord("ｶ"): "か"})],
    ["Ⅷ", "VIII"],
    ["❤️", "❤"],
    ["a, b; (c)", "a b c", "a b, c."],
    ["soft\u00adhyphen", "softhyphen"],
    ["f'(x)", "f′(x)", "f’(x)", "F ′ (x)".replace(" ", "")],
    ["f''(x)", "f″(x)", "f′′(x)"],
    ["Plan B!", "plan b", "Plan B.", "'Plan B'"],
    ["an A! it was I! oh, B!", "an A. It was I. Oh, B"],
    ["letters 'a' or 'b'", 'letters "a" or "b"', "letters a or b"],
    ["'a' + 'b' = 'c'", '"a" + "b" = "c"', "a + b = c"],
    ["rock 'n' roll", "rock n roll"],
    ["the dogs' = John's", "the dogs = john's"],
    ["see [2,3] and (2,3)", "see 2,3 and (2,3)"],
    ["x[1], y[i] (a, b)", "x 1 y i a b"],
    ["(see [1, 2], or [3])", "see 1, 2 or 3"],
    ["Dear {name}! dear [Name]!", "Dear name, dear name"],
]


@pytest.mark.parametrize("texts", APART + APART_AS_WORDS, ids=lambda texts: texts[0])
def test_different_texts_stay_apart(texts):
    assert len({words(text) for text in texts}) == len(texts)
    assert (deduplicate(pa.array(texts)).matched == -1).all()


@pytest.mark.parametrize("texts", ALIKE, ids=lambda texts: texts[0])
def test_writing_makes_no_difference(texts):
    assert {words(text) for text in texts} == {words(texts[0])}
    assert deduplicate(pa.array(texts)).kept.sum() == 1


def test_words_by_example():
    assert words("What's 3,5?  YES!") == "what's 3,5 yes"
    assert words("Don't STOP_now 3x") == "don't stop_now 3x"
    assert words("你好abc。世") == "你 好 abc 世"
    assert words("ที่นี่") == "ที่ นี่"
    assert words("a\u200bb https://a.org/x-y") == "a b https // a.org / x - y"
    assert words("state-of-the-art -- he said -- so 5-6") == "state of the art he said so 5 - 6"


# ---- the number guard ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(
            TEXT
            | st.sampled_from(["three", "twice", "threefold", "1,200", "12,34", "3.5", "5%", "-4"])
            | st.sampled_from([" ", " ", "$", "(", "&&", "||", "x", "#", "C#", "°", "€", "≈"]),
            max_size=12,
        ).map("".join),
        max_size=4,
    )
)
def test_quantities_in_compiled_code_are_those_of_plain_python(texts):
    worded = words_of(texts)
    told = [numbers(text) for text in worded.strings()]
    assert quantities(worded) == told
    same = guards(worded)[:, None] == guards(worded)[None, :]
    assert same.tolist() == [[a == b for b in told] for a in told]


def test_numbers_keep_order_operators_and_words():
    def told(text):
        return numbers(words(text))

    assert told("Tom has 1,200 apples and 3.5 kg, Ann TWO.") == ("1200", "3.5", "two")
    assert len({told(t) for t in ("3 + 4", "3 * 4", "3 - 4", "4 + 3", "-3 + 4", "3 + -4")}) == 6
    assert told("5 then 6") != told("6 then 5")
    assert len({told(t) for t in ("20% off", "20 off", "$20 off", "€20 off", "20 € off")}) == 5
    assert told("costs 5.") == told("costs 5") == ("5",)
    assert told("x2 and x^2") == ("2", "^", "2")
    assert told("while x > y") != told("while x < y") != told("while x == y")
    assert told("learn C# fast") != told("learn C++ fast") != told("learn C fast")
    # Prose tells nothing: dashes, bullets, slashes, quotes.
    assert told("He came - late - and/or **never**.") == ()


# ---- decisions -----------------------------------------------------------------------------------


def lines(name):
    return [json.loads(line) for line in (CASES / name).read_text("utf-8").splitlines()]


def frame(rows):
    made = []
    for question, response in rows:
        row = make_row([message("user", question), message("assistant", response)])
        made.append((row["id"], row["prompt_id"], question, response))
    return pl.DataFrame(made, schema=["id", "prompt_id", "prompt", "response"], orient="row")


def leaked(pool, test):
    """The questions of a pool that overlap a test set."""
    rows, asked = frame(pool), frame(test).drop("prompt_id")
    asked = asked.with_columns(set=pl.lit("test"), role=pl.lit("test"))
    gate = Decontamination()
    gone = gate.apply(rows, gate.index(asked)).removed["id"]
    return rows.filter(pl.col("id").is_in(gone.to_list()))["prompt"].to_list()


def test_of_the_cases_only_the_leak_goes():
    pool = [(row["question"], row["response"]) for row in lines("decontamination/pool.jsonl")]
    test = [(row["question"], row["response"]) for row in lines("decontamination/test.jsonl")]
    assert leaked(pool, test) == ["Name the capital of the country France."]


LONG = "In the course of this exercise you are asked to look at {} and to say what it comes to."


@pytest.mark.parametrize("texts", [t for t in APART if "🇫🇷" not in t], ids=lambda texts: texts[0])
@pytest.mark.parametrize("pattern", ["{}", "What is {}?"])
def test_a_different_short_question_is_no_leak(texts, pattern):
    asked = [(pattern.format(text), "gold") for text in texts]
    for k, question in enumerate(asked):
        others = [other for other in asked if other != question]
        found = leaked([(question[0], "mine")], others)
        assert not found, (question, texts[k])


@pytest.mark.parametrize("texts", ALIKE, ids=lambda texts: texts[0])
def test_a_question_written_otherwise_is_a_leak(texts):
    for text in texts[1:]:
        assert leaked([(text, "mine")], [(texts[0], "gold")]) == [text]


@pytest.mark.parametrize("k", [0, 1, 4, 5, 7, 12])
def test_a_long_question_with_another_operator_is_another_question(k):
    texts = [LONG.format(text) for text in APART[k] if text != "y - x"]
    assert not leaked([(texts[0], "mine")], [(text, "gold") for text in texts[1:]])


@pytest.mark.parametrize("name", ["symbols", "khmer"])
def test_cases_of_duplicates(name):
    texts = [row["text"] for row in lines(f"dedup/{name}.jsonl")]
    found = deduplicate(pa.array(texts)).matched.tolist()
    assert found == ([-1] * len(texts) if name == "symbols" else [-1, 0, 0])
    if name == "symbols":
        response = "The very same answer is given to each of them, word for word."
        rows = frame([(text, response) for text in texts]).with_columns(
            answer=pl.lit(None, pl.String)
        )
        assert select(Duplicates(), rows).removed.is_empty()


@settings(deadline=None, max_examples=60)
@given(TEXT, TEXT)
def test_the_engines_agree_on_what_is_the_same_text(left, right):
    same = words(left) == words(right)
    if words(left):
        short = shingles_reference(left, 99) == shingles_reference(right, 99)
        grams = word_grams_reference(words(left), 99) == word_grams_reference(words(right), 99)
        assert short == grams == same
        assert (deduplicate(pa.array([left, right]), None).kept.sum() == 1) >= same
