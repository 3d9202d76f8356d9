# ruff: noqa: E501, RUF001 (texts stand on one line each, in their own script)
"""Checkable instructions: each against planted texts and a plain reference, and how they are read."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from siftline.scoring.verifiers import get_verifier
from siftline.scoring.verifiers.instruction_checks import (
    CHECKS,
    bullets,
    capital_words,
    sentences,
    words,
)

WORDS = st.sampled_from(
    ["sun", "moon", "star", "river", "stone", "house", "green", "quick", "seven", "paper"]
)
word_lists = st.lists(WORDS, min_size=1, max_size=25)
RELATIONS = {
    "at least": lambda n, k: n >= k, "less than": lambda n, k: n < k, "at most": lambda n, k: n <= k,
    "more than": lambda n, k: n > k, "exactly": lambda n, k: n == k,
}  # fmt: skip
relations = st.sampled_from(sorted(RELATIONS))
small = st.integers(0, 8)
verify = get_verifier("instructions")


def asked(*pairs):
    """The published layout, as its table has it: every argument in each, null where not used."""
    every = {name: None for _, given in pairs for name in given}
    return json.dumps(
        {
            "instruction_id_list": [name for name, _ in pairs],
            "kwargs": [every | given for _, given in pairs],
        }
    )


def follows(text, name, **given):
    verdict = verify(text, asked((name, given)))
    if verdict.correct is False:
        assert verdict.extracted == f"not followed: {name}"
        assert verdict.reason == "wrong_answer"
    if verdict.correct is None:
        assert name in verdict.reason
    return verdict.correct


@given(word_lists, small, relations)
def test_number_words(found, n, relation):
    wanted = RELATIONS[relation](len(found), n)
    for text in (
        " ".join(found),
        "\n".join(found),
        ", ".join(found) + "!",
        "*" + "*  *".join(found) + "*",
    ):
        assert (
            follows(text, "length_constraints:number_words", num_words=n, relation=relation)
            is wanted
        )


@given(
    st.lists(word_lists, min_size=1, max_size=6),
    small,
    relations,
    st.sampled_from(".!?"),
    st.sampled_from([" ", "\n\n"]),
)
def test_number_sentences(found, n, relation, mark, between):
    text = between.join(" ".join(s).capitalize() + mark for s in found)
    wanted = RELATIONS[relation](len(found), n)
    assert (
        follows(text, "length_constraints:number_sentences", num_sentences=n, relation=relation)
        is wanted
    )
    assert (
        follows(
            text.lower(), "length_constraints:number_sentences", num_sentences=n, relation=relation
        )
        is wanted
    )


@given(st.lists(word_lists, min_size=1, max_size=5), small, st.booleans(), st.booleans())
def test_number_paragraphs(found, n, first, last):
    text = "\n***\n".join(" ".join(p) for p in found)
    text = "***\n" * first + text + "\n***" * last
    assert follows(text, "length_constraints:number_paragraphs", num_paragraphs=n) is (
        len(found) == n
    )
    empty = text.replace("***", "***\n\n***", 1)
    if "***" in text and not first and len(found) > 1:
        assert follows(empty, "length_constraints:number_paragraphs", num_paragraphs=n) is False


@given(
    st.lists(word_lists, min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 5),
    WORDS,
    st.sampled_from(["{}", '"{}', "{},", "**{}**"]),
)
def test_nth_paragraph_first_word(found, n, nth, word, dress):
    text = "\n\n".join(" ".join([dress.format(p[0].capitalize()), *p[1:]]) for p in found)
    wanted = len(found) == n and nth <= n and found[nth - 1][0] == word
    name = "length_constraints:nth_paragraph_first_word"
    assert follows(text, name, num_paragraphs=n, nth_paragraph=nth, first_word=word) is wanted


@given(word_lists, st.lists(WORDS, min_size=1, max_size=3))
def test_keywords_exist_and_are_forbidden(found, wanted):
    text = " ".join(word.upper() if i % 2 else word for i, word in enumerate(found)) + "."
    has = [word in found for word in wanted]
    assert follows(text, "keywords:existence", keywords=wanted) is all(has)
    assert follows(text, "keywords:forbidden_words", forbidden_words=wanted) is not any(has)


def test_a_keyword_may_stand_in_a_longer_word_and_a_forbidden_one_may():
    assert follows("the sunshine", "keywords:existence", keywords=["sun"]) is True
    assert follows("the sunshine", "keywords:forbidden_words", forbidden_words=["sun"]) is True
    assert follows("c++ is fun", "keywords:forbidden_words", forbidden_words=["C++"]) is False
    assert follows("a.c", "keywords:existence", keywords=["a+c", "a.c"]) is False


@given(word_lists, WORDS, small, relations)
def test_keyword_frequency(found, word, n, relation):
    wanted = RELATIONS[relation](found.count(word), n)
    text = ", ".join(found).title()
    assert (
        follows(text, "keywords:frequency", keyword=word, frequency=n, relation=relation) is wanted
    )


@given(st.text("abcAB! ", min_size=1, max_size=30), st.sampled_from("abc!"), small, relations)
def test_letter_frequency(text, letter, n, relation):
    assume(text.strip())
    count = len(re.findall(re.escape(letter), text, re.IGNORECASE))
    name = "keywords:letter_frequency"
    wanted = RELATIONS[relation](count, n)
    assert follows(text, name, letter=letter, let_frequency=n, let_relation=relation) is wanted


LANGUAGES = {
    "en": "The river runs through the old town and under the stone bridge to the sea.",
    "de": "Der Fluss fließt durch die alte Stadt und unter der steinernen Brücke zum Meer.",
    "fr": "La rivière traverse la vieille ville et passe sous le pont de pierre jusqu'à la mer.",
    "es": "El río atraviesa la ciudad vieja y pasa por debajo del puente de piedra hasta el mar.",
    "ru": "Река протекает через старый город и под каменным мостом к морю, где стоят корабли.",
    "hi": "नदी पुराने शहर से होकर पत्थर के पुल के नीचे समुद्र तक बहती है और लोग देखते हैं।",
    "zh": "这条河流经古老的城市，从石桥下面流向大海，人们每天都在河边散步和聊天，非常美丽。",
    "ar": "يجري النهر عبر المدينة القديمة وتحت الجسر الحجري إلى البحر حيث السفن",
    "ja": "川は古い町を流れ、石の橋の下を通って海へと続いています。とても美しいです。",
    "ko": "강은 오래된 도시를 지나 돌다리 아래로 흘러 바다로 갑니다. 매우 아름답습니다.",
}  # fmt: skip


@pytest.mark.parametrize("code", LANGUAGES)
def test_response_language(code):
    pytest.importorskip("py3langid")
    for other, text in LANGUAGES.items():
        assert follows(text, "language:response_language", language=code) is (other == code)
    assert follows(LANGUAGES[code], "language:response_language", language=f"{code}-XX") is True


def test_a_language_that_nobody_can_tell_is_open():
    assert follows("Ok.", "language:response_language", language="en") is None
    assert follows(LANGUAGES["en"], "language:response_language", language="xx") is None
    assert follows("Ok.", "language:response_language") is None


@given(word_lists, st.integers(0, 5), st.integers(0, 5))
def test_number_placeholders(found, has, n):
    text = " ".join([*found, *(f"[{word}]" for word in found[:has])])
    wanted = min(has, len(found)) >= n
    assert follows(text, "detectable_content:number_placeholders", num_placeholders=n) is wanted


@pytest.mark.parametrize(
    ("text", "mark", "wanted"),
    [
        ("Bye.\n\nP.S. One more.", "P.S.", True),
        ("Bye. p. s. One more.", "P.S.", True),
        ("Bye.\nP.P.S. One more.", "P.P.S", True),
        ("Bye.\nP.S. One more.", "P.P.S", False),
        ("Bye. The ship.s. sails", "P.S.", False),
        ("Bye.\nPS: One more.", "P.S.", False),
        ("Bye.\nNB: One more.", "nb:", True),
        ("Bye.", "P.S.", False),
    ],
)
def test_postscript(text, mark, wanted):
    assert follows(text, "detectable_content:postscript", postscript_marker=mark) is wanted


@given(st.lists(WORDS, max_size=6), small, st.sampled_from("*-"), st.booleans())
def test_number_bullet_lists(found, n, mark, bold):
    items = [f"{mark} {'**' * bold}{word}{'**' * bold}" for word in found]
    text = "\n".join(["So, **so**:", *items, "done"])
    assert follows(text, "detectable_format:number_bullet_lists", num_bullets=n) is (
        len(found) == n
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("My answer is yes.", True),
        (" My answer is maybe.\n", True),
        ("Well. My answer is no.", True),
        ("my answer is no", False),
        ("Yes.", False),
        ("My answer is yes. My answer is no.", None),
    ],
)
def test_constrained_response(text, wanted):
    assert follows(text, "detectable_format:constrained_response") is wanted


@given(st.lists(st.tuples(WORDS, st.sampled_from(["*", "**", ""])), min_size=1, max_size=8), small)
def test_number_highlighted_sections(found, n):
    text = " ".join(f"{mark}{word} x{mark}" for word, mark in found)
    wanted = sum(bool(mark) for _, mark in found) >= n
    assert (
        follows(text, "detectable_format:number_highlighted_sections", num_highlights=n) is wanted
    )
    bulleted = "\n".join(f"* {word}" for word, _ in found)
    assert (
        follows(bulleted, "detectable_format:number_highlighted_sections", num_highlights=1)
        is False
    )


@given(
    st.lists(word_lists, max_size=5), small, st.sampled_from(["Section", "SECTION", "Part", "Q."])
)
def test_multiple_sections(found, n, mark):
    text = "Intro\n" + "\n".join(f"{mark} {i + 1}\n{' '.join(p)}" for i, p in enumerate(found))
    name = "detectable_format:multiple_sections"
    assert follows(text, name, section_spliter=mark, num_sections=n) is (len(found) >= n)
    assert follows(text, name, section_spliter="Akt", num_sections=1) is False


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5))  # fmt: skip
def test_json_format(value):
    text = json.dumps(value)
    assert follows(text, "detectable_format:json_format") is True
    assert follows(f"```json\n{text}\n```", "detectable_format:json_format") is True
    assert follows(f"Here it is:\n{text}", "detectable_format:json_format") is False
    assert follows(text + ",", "detectable_format:json_format") is False


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("[" * 9 + "]" * 9, True), ("[" * 100_000 + "]" * 100_000, None), ("NaN", False), ("1" * 5000, True),
     ("{'a': 1}", False), ("```\n[1]\n```", True), ("```json\n[1]", False)],
)  # fmt: skip
def test_json_at_its_edges(text, wanted):
    assert follows(text, "detectable_format:json_format") is wanted


@given(word_lists, st.sampled_from(["<<{}>>", "<{}>", "<<>>{}", "<< >>{}", "{}", "«{}»", "<<{}"]))
def test_title(found, form):
    text = form.format(" ".join(found)) + "\n\nOnce upon a time."
    assert follows(text, "detectable_format:title") is (form == "<<{}>>")


@given(st.lists(word_lists, min_size=1, max_size=4), st.booleans())
def test_two_responses(found, ends):
    parts = [" ".join(p) for p in found]
    text = "\n******\n".join(parts) + "\n******" * ends
    wanted = len(parts) == 2 and parts[0] != parts[1]
    assert follows(text, "combination:two_responses") is wanted


@given(word_lists, word_lists, st.sampled_from([
    ("combination:repeat_prompt", "prompt_to_repeat"), ("startend:start_checker", "start_phrase"),
    ("multi-turn:constrained_start", "starter")]))  # fmt: skip
def test_start(first, rest, named):
    name, argument = named
    start = " ".join(first)
    text = f"\n{start.capitalize()} {' '.join(rest)}."
    assert follows(text, name, **{argument: start}) is True
    assert follows("Well. " + text, name, **{argument: start}) is False
    assert follows(text, name, **{argument: " ".join(rest)}) is text.strip().lower().startswith(
        " ".join(rest)
    )


@given(word_lists, word_lists, st.sampled_from(["", "\n", '"', ' "']))
def test_end(first, last, behind):
    end = " ".join(last)
    text = f"{' '.join(first)} {end.upper()}"
    assert follows(text + behind, "startend:end_checker", end_phrase=end) is True
    assert follows(text + " no" + behind, "startend:end_checker", end_phrase=end) is False


@given(word_lists, st.sampled_from(['"{}"', '"{}', '{}"', "{}", "'{}'", ' "{}"\n']))
def test_quotation(found, form):
    text = form.format(" ".join(found))
    assert follows(text, "startend:quotation") is (form.strip() == '"{}"')


@given(st.lists(st.tuples(WORDS, st.booleans()), min_size=1, max_size=12), small, relations)
def test_capital_word_frequency(found, n, relation):
    text = " ".join(word.upper() if up else word for word, up in found) + "."
    wanted = RELATIONS[relation](sum(up for _, up in found), n)
    name = "change_case:capital_word_frequency"
    assert follows(text, name, capital_frequency=n, capital_relation=relation) is wanted


@given(word_lists, st.sampled_from([str.upper, str.lower, str.title]))
def test_case(found, case):
    pytest.importorskip("py3langid")
    text = case(" ".join(["The", *found, "and the", *found])) + ". 1!"
    upper, lower = "change_case:english_capital", "change_case:english_lowercase"
    short = follows(text, upper), follows(text, lower)
    assert short[0] in ((True, None, False) if case is str.upper else (False,))
    assert short[1] in ((True, None, False) if case is str.lower else (False,))


def test_case_of_english_and_of_other_languages():
    pytest.importorskip("py3langid")
    for code, text in LANGUAGES.items():
        if code in ("zh", "hi", "ar", "ja", "ko"):
            assert follows(text, "change_case:english_capital") is False
            continue
        assert follows(text.upper(), "change_case:english_capital") is (code == "en")
        assert follows(text.lower(), "change_case:english_lowercase") is (code == "en")
        assert follows(text, "change_case:english_lowercase") is False


@given(word_lists, st.sampled_from([" ", ", ", ",", "; ", "، ", "、"]))
def test_no_comma(found, between):
    text = between.join([*found, "end"])
    wanted = False if "," in between else None if between in ("، ", "、") else True
    assert follows(text, "punctuation:no_comma") is wanted


@given(word_lists, st.sampled_from([".", "!", "", ","]))
def test_marks_and_edges(found, mark):
    text = " ".join(found) + mark
    assert follows(text, "punctuation:punctuation_dot") is (mark != ".")
    assert follows(text, "punctuation:punctuation_exclamation") is (mark != "!")
    for word in {*found}:
        assert follows(text.capitalize(), "first_word:first_word_answer", first_word=word) is (
            found[0] == word
        )
        assert follows(text, "last_word:last_word_answer", last_word=word) is (found[-1] == word)


def test_every_check_has_a_test_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in CHECKS if f'"{name}"' not in source] == []


PUBLISHED = [
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "keywords:letter_frequency",
    "language:response_language",
    "length_constraints:number_sentences",
    "length_constraints:number_paragraphs",
    "length_constraints:number_words",
    "length_constraints:nth_paragraph_first_word",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
    "detectable_format:title",
    "combination:two_responses",
    "combination:repeat_prompt",
    "startend:end_checker",
    "startend:quotation",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
]


def test_all_ids_of_the_published_set_are_known():
    assert len(PUBLISHED) == 25
    assert set(PUBLISHED) <= set(CHECKS)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("Dr. No came. He left.", 2, 3),
        ("In 1999 it rained. Then it snowed.", 2, 2),
        ("It was in 1999. Then it snowed.", 2, 2),
        ("# A heading\n\nOne here. Two here.", 2, 3),
        ('"Why?" he asked. He left.', 2, 3),
        ("1. One here.\n2. Two here.", 2, 2),
        ("No end at all", 1, 1),
        ("Pi is 3.14 here. See example.com now.", 2, 2),
        ("你好。我很好。", 2, 2),
        ("one here. two here.", 2, 2),
        ("...", 0, 0),
    ],
)
def test_sentences_that_readers_count_alike_and_differently(text, least, most):
    assert (sentences(text).least, sentences(text).most) == (least, most)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("I don't know", 3, 4), ("a well-known man", 3, 4), ("3.14 or 2", 3, 4), ("1. one\n2. two", 2, 4),
        ("नदी पुराने शहर", 3, 3), ("你好", 1, 2), ("* a\n* b", 2, 2), ("", 0, 0), ("--- !", 0, 0),
    ],
)  # fmt: skip
def test_words_that_readers_count_alike_and_differently(text, least, most):
    assert (words(text).least, words(text).most) == (least, most)


def test_where_readers_differ_the_verdict_is_open():
    name = "length_constraints:number_words"
    assert follows("I don't know", name, num_words=4, relation="at least") is None
    assert follows("I don't know", name, num_words=3, relation="at least") is True
    assert follows("I don't know", name, num_words=5, relation="at least") is False
    assert follows("I don't know", name, num_words=4, relation="exactly") is None


@given(st.text(max_size=60))
def test_ranges_are_ranges_for_any_text(text):
    for count in (words, sentences, capital_words, bullets):
        found = count(text)
        assert 0 <= found.least <= found.most


TEXT = "I agree. It is good.\nP.S. Bye"
GOOD = ("punctuation:no_comma", {})
BAD = ("length_constraints:number_words", {"num_words": 100, "relation": "at least"})
ODD = ("detectable_format:palindrome", {"n": 3})


def test_one_broken_instruction_is_a_mismatch_and_one_unknown_leaves_it_open():
    assert verify(TEXT, asked(GOOD)).reason == "match"
    both = verify(TEXT, asked(GOOD, BAD))
    assert (both.correct, both.extracted) == (
        False,
        "not followed: length_constraints:number_words",
    )
    odd = verify(TEXT, asked(GOOD, ODD))
    assert odd.correct is None
    assert odd.reason == "unreadable: can't tell detectable_format:palindrome (unknown)"
    assert verify(TEXT, asked(GOOD, ODD, BAD)).correct is False, "a proof is a proof"


LAYOUTS = [
    json.dumps({"instruction_id_list": [GOOD[0], BAD[0]], "kwargs": [{}, BAD[1]]}),
    json.dumps([{"instruction_id": [GOOD[0], BAD[0]], "kwargs": [None, BAD[1]]}]),
    repr([{"instruction_id": [GOOD[0], BAD[0]], "kwargs": [None, BAD[1]]}]),
    json.dumps([{"id": GOOD[0]}, {"id": BAD[0], **BAD[1]}]),
    json.dumps([GOOD[0], {"id": BAD[0], "kwargs": BAD[1]}]),
    json.dumps({"instruction_id_list": [GOOD[0], BAD[0]], "kwargs": json.dumps([{}, BAD[1]])}),
    json.dumps({"instruction_id_list": [GOOD[0], BAD[0]], "kwargs": ["{}", json.dumps(BAD[1])]}),
]


@pytest.mark.parametrize("answer", LAYOUTS)
def test_every_layout_says_the_same(answer):
    assert verify(TEXT, answer) == verify(TEXT, asked(GOOD, BAD))
    long = " ".join(["word"] * 100)
    assert verify(long, answer).reason == "match"


@pytest.mark.parametrize(
    "answer",
    ["{", "[]", "{}", "5", "null", '{"instruction_id_list": ["a:b"], "kwargs": []}', "[5]", '[{"n": 1}]',
     '{"instruction_id_list": [5]}', '[{"id": "punctuation:no_comma", "kwargs": "x"}]', "[" * 100_000,
     "-" * 100_000, '{"instruction_id_list": "', "x" * 300_000,
     '[{"id": "length_constraints:number_words", "num_words": "many"}]',
     '[{"id": "length_constraints:number_words", "num_words": 3, "relation": "around"}]',
     '[{"id": "length_constraints:number_words"}]', '[{"id": "keywords:existence", "keywords": "sun"}]',
     '[{"id": "keywords:existence", "keywords": [3]}]', '[{"id": "keywords:existence", "keywords": []}]',
     '[{"id": "keywords:letter_frequency", "letter": "ab", "let_frequency": 1}]'],
)  # fmt: skip
def test_instructions_that_can_not_be_read_decide_nothing(answer):
    verdict = verify(TEXT, answer)
    assert verdict.correct is None
    assert verdict.reason.startswith("unreadable: ")
    assert len(verdict.reason) <= 500


def test_without_instructions_or_a_response_there_is_no_verdict():
    assert verify(TEXT, " ").reason == "no_reference"
    assert verify(" ", asked(GOOD)).reason == "no_final_answer"
    assert verify("<think>so, ", asked(GOOD)).reason == "no_final_answer"
    assert verify("<think>a, b</think>c", asked(GOOD)).reason == "match"
    assert (
        verify("a" * 1_000_001, asked(GOOD)).reason == "unreadable: 1000001 characters are too many"
    )


ALL = [
    ("keywords:existence", {"keywords": ["sun"]}),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}),
    ("length_constraints:number_sentences", {"num_sentences": 3}),
    ("length_constraints:number_words", {"num_words": 3}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 3}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 3}),
    ("detectable_format:json_format", {}), ("detectable_format:title", {}),
    ("combination:two_responses", {}), ("startend:quotation", {}), ("change_case:english_capital", {}),
    ("change_case:capital_word_frequency", {"capital_frequency": 3}), ("punctuation:no_comma", {}),
    ("last_word:last_word_answer", {"last_word": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(
    "unit",
    ["a ", ". ", "...", "A. ", "* ", "*", "**a", "[", "<<", "P.", "p. ", "***", "Part ", "```json\n", "\n", '"',
     "1. ", "- x\n", "\u4f60", "a-", "'", "{", "[1,", "mr. ", "?!", " "],
)  # fmt: skip
def test_the_cost_grows_with_the_length(unit):
    def seconds(size):
        text = "a" + unit * (size // len(unit))
        best = 9.0
        for _ in range(3):
            started = time.process_time()
            verify(text, asked(*ALL))
            best = min(best, time.process_time() - started)
        return best

    assert seconds(20_000) < 10 * seconds(5_000) + 0.05
