"""One check for each instruction of the IFEval kind (arXiv 2311.07911), by its published name.

A check takes the text and the instruction's own arguments and returns whether the text follows it:
True, False, or None where readers may differ. Each is linear in the text's length.
Our own reading of the paper and of the public data: what its words leave open is read as the
published programs read it, so that sets made for them keep their meaning.

How many words, sentences, bullets a text has: the fewest and the most that readers count.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from siftline.kernels.text.normalization import normalized

_IDEOGRAPHS = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
"""Scripts that write no space between words."""
_RUN = re.compile(r"\w+")
_SPACELESS = re.compile(rf"[{_IDEOGRAPHS}]")
_JOINED = re.compile(r"\w+(?:['\u2019\-\u2010\u2011.,/@:&]\w+)*")
_NUMBERING = re.compile(r"^[ \t]*\d{1,4}[.)](?=\s)", re.M)
_END = re.compile(
    r"(?P<mark>(?<![.!?\u2026])[.!?\u2026]+|[\u3002\uff01\uff1f\u0964\u061f])"
    r"[\"'\u201d\u2019\u300d\u300f)\]*_]*(?=\s|$|(?<=[\u3002\uff01\uff1f\u300d\u300f]))"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|vol|pp?|inc|ltd|co|corp|jr|sr|dept|approx|est"
    r"|gen|col|lt|sgt|rev|hon|mt|ave|blvd|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|cf|al|ca|op"
    r"|e\.g|i\.e|a\.m|p\.m|ph\.d|u\.s|u\.k|(?-i:[A-Z])|(?:[a-z]\.)+[a-z])$",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.M)
_BULLET_LIKE = re.compile(r"^[ \t]*(?:[*+\u2022\u2023\u25e6-](?![*-])[ \t]*[^\s*-])", re.M)


@dataclass(frozen=True)
class Range:
    """A count that readers may differ on.

    Attributes:
        least: The fewest.
        most: The most.
    """

    least: int
    most: int

    def __str__(self) -> str:
        """The number, or both."""
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


def without_marks(text: str) -> str:
    """The text without combining marks, which end a word to Python's regular expressions."""
    if text.isascii():
        return text
    return "".join(c for c in normalized("NFC", text) if unicodedata.category(c)[0] != "M")


def words(text: str) -> Range:
    """Words: at least what hyphens and apostrophes leave whole, at most every run of letters.

    Of a script without spaces each character may be one. The numbers of a list may not count.
    """
    text = without_marks(text)
    fewest = len(_JOINED.findall(_NUMBERING.sub("", text)))
    runs = len(_RUN.findall(text))
    return Range(min(fewest, runs), max(runs, runs + len(_SPACELESS.findall(text)) - 1))


def capital_words(text: str) -> Range:
    """Words in capital letters; those of one letter (`I`, `A`) may not count."""
    text = without_marks(text)
    joined = [word for word in _JOINED.findall(text) if word.isupper()]
    runs = [word for word in _RUN.findall(text) if word.isupper()]
    longer = [sum(sum(map(str.isalpha, w)) > 1 for w in words) for words in (joined, runs)]
    return Range(min(longer), max(len(joined), len(runs)))


def sentences(text: str) -> Range:
    """Sentences: a full stop behind an abbreviation or before a small letter may be no end.

    Lines without an end of their own (headings, items) may be sentences.
    """
    small = not any(map(str.isupper, text))
    sure, place = 0, 0
    for end in _END.finditer(text):
        begun = _begun(text, place, end.start())
        if begun and _sure(text, place, end, small):
            sure += 1
        if not begun or _sure(text, place, end, small):
            place = end.end()
    least = sure + bool(_RUN.search(text, place))
    most = sum(map(_pieces, text.split("\n")))
    return Range(min(least, most), max(least, most))


def _begun(text: str, place: int, end: int) -> bool:
    """Whether a piece of text has a word that is no number of a list."""
    first = _RUN.search(text, place, end)
    return first is not None and not (
        first.end() == end and first[0].isdecimal() and end - place < 9
    )


def _sure(text: str, place: int, end: re.Match[str], small: bool) -> bool:
    """Whether a sentence that begins at `place` ends here for sure."""
    mark = end["mark"]
    behind = text[end.end() : end.end() + 40].lstrip(" \t\n*_#>-\"'\u201c\u2018(")
    if (behind[:1].islower() and not small) or (mark[0] in ".\u2026" and len(mark) > 1 and behind):
        return False
    before = text[max(place, end.start() - 20) : end.start()]
    return not (mark == "." and behind and _ABBREVIATION.search(before))


def _pieces(line: str) -> int:
    found, place = 0, 0
    for end in _END.finditer(line):
        found += _begun(line, place, end.start())
        place = end.end()
    return found + _begun(line, place, len(line))


def bullets(text: str) -> Range:
    """Items of bullet lists: at least `* x` and `- x`, at most every line that looks like one."""
    least = len(_BULLET.findall(text))
    return Range(least, max(least, len(_BULLET_LIKE.findall(text))))


Truth = bool | None

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, n: count >= n,
    "no less than": lambda count, n: count >= n,
    "more than": lambda count, n: count > n,
    "less than": lambda count, n: count < n,
    "fewer than": lambda count, n: count < n,
    "at most": lambda count, n: count <= n,
    "no more than": lambda count, n: count <= n,
    "exactly": lambda count, n: count == n,
    "equal to": lambda count, n: count == n,
}
_MARKED = re.compile(r"\*\*(?P<bold>[^\n*]+)\*\*|\*(?P<plain>[^\n*]+)\*")
_TITLE = re.compile(r"<<(?=[^\n<>]*[^\n<>\s])[^\n<>]+>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
_JSON_FENCE = re.compile(
    r"\s*```[ \t]*(?:json)?[ \t]*\n(?P<json>.*)\n[ \t]*```\s*", re.I | re.DOTALL
)
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_EDGES = "\"'\u201c\u201d\u2018\u2019`*_#(["
_OTHER_COMMAS = frozenset("\uff0c\u060c\u3001\u055d\u1363")
_VARIETIES = {"ar": ("ary", "arz"), "no": ("nn",), "zh": ("wuu", "yue")}
"""Languages that the model tells from one which is asked for, and a reader need not."""
_SURE, _NEVER, _LETTERS = 0.9, 0.01, 20
"""Of a language: its probability when it is that one, when it is not, and letters it takes to say.

py3langid is right on 99.9 % of English texts from 80 letters on (`scoring.measures.degenerate`)."""


class Unusable(ValueError):
    """An instruction's arguments can't be used; the message says which and why."""


def _number(value: Any, name: str) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise Unusable(f"{name} is {value!r}, no whole number")
    return int(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{name} is {value!r}, no text")
    return value


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise Unusable(f"{name} is {value!r}, no list of texts")
    return [_text(item, name) for item in value]


def compared(count: Range, relation: Any, wanted: Any, name: str) -> Truth:
    """Whether a count stands in a relation to a number, whichever reader counts."""
    holds = _RELATIONS.get(relation.strip().lower() if isinstance(relation, str) else "at least")
    if holds is None:
        raise Unusable(f"the relation is {relation!r}: {', '.join(_RELATIONS)} are known")
    number = _number(wanted, name)
    found = {holds(n, number) for n in (count.least, count.most)}
    if len(found) > 1 or (count.least < number < count.most and found == {False}):
        return None
    return found.pop()


def _just(count: int) -> Range:
    return Range(count, count)


def keywords_exist(text: str, keywords: Any) -> Truth:
    """Every keyword occurs, in any case, also inside a longer word."""
    folded = text.casefold()
    return all(word.casefold() in folded for word in _texts(keywords, "keywords"))


def keyword_frequency(text: str, keyword: Any, frequency: Any, relation: Any = None) -> Truth:
    """A keyword occurs so often, in any case, also inside longer words."""
    count = text.casefold().count(_text(keyword, "keyword").strip().casefold())
    return compared(_just(count), relation, frequency, "frequency")


def forbidden_words(text: str, forbidden_words: Any) -> Truth:
    """No forbidden word occurs as a word of its own, in any case."""
    return not any(_word(word).search(text) for word in _texts(forbidden_words, "forbidden_words"))


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)


def letter_frequency(text: str, letter: Any, let_frequency: Any, let_relation: Any = None) -> Truth:
    """A letter, or a sign, occurs so often, in any case."""
    wanted = _text(letter, "letter").strip()
    if len(wanted) != 1:
        raise Unusable(f"letter is {letter!r}, not one letter")
    count = text.lower().count(wanted.lower())
    return compared(_just(count), let_relation, let_frequency, "let_frequency")


def response_language(text: str, language: Any) -> Truth:
    """The text is in a language, by its code."""
    from siftline.scoring.measures.degenerate import (
        distinct,
        known_languages,
        letters,
        probabilities,
    )

    code = _text(language, "language").strip().lower().partition("-")[0].partition("_")[0]
    try:
        known = set(known_languages())
    except ValueError as error:  # the package is not here
        raise Unusable(str(error)) from error
    if code not in known:
        raise Unusable(f"the language {language!r} is not known")
    if letters(text) < _LETTERS:
        return None
    said = probabilities(distinct(text.lower()))
    chance = sum(said.get(name, 0.0) for name in (code, *_VARIETIES.get(code, ())))
    return True if chance >= _SURE else False if chance <= _NEVER else None


def number_sentences(text: str, num_sentences: Any, relation: Any = None) -> Truth:
    """So many sentences."""
    return compared(sentences(text), relation, num_sentences, "num_sentences")


def number_words(text: str, num_words: Any, relation: Any = None) -> Truth:
    """So many words."""
    return compared(words(text), relation, num_words, "num_words")


def number_paragraphs(text: str, num_paragraphs: Any) -> Truth:
    """Exactly so many paragraphs, with `***` between them and none empty."""
    parts = [part.strip() for part in _DIVIDER.split(text)]
    inner = parts[1 if not parts[0] else 0 : -1 if not parts[-1] and len(parts) > 1 else None]
    return all(inner) and len(inner) == _number(num_paragraphs, "num_paragraphs")


def nth_paragraph_first_word(
    text: str, num_paragraphs: Any, nth_paragraph: Any, first_word: Any
) -> Truth:
    """So many paragraphs with empty lines between them, the n-th of which begins with a word."""
    paragraphs = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    place = _number(nth_paragraph, "nth_paragraph")
    if len(paragraphs) != _number(num_paragraphs, "num_paragraphs"):
        return False
    return 1 <= place <= len(paragraphs) and _begins(paragraphs[place - 1], first_word)


def _begins(text: str, first_word: Any) -> bool:
    wanted = _text(first_word, "first_word").strip().casefold()
    found = re.match(r"[^\s.,!?;:\"\u201d)\]]*", text.lstrip().lstrip(_EDGES))
    return found is not None and found[0].rstrip("'*_`").casefold() == wanted


def number_placeholders(text: str, num_placeholders: Any) -> Truth:
    """At least so many placeholders in square brackets."""
    count = len(_PLACEHOLDER.findall(text))
    return compared(_just(count), "at least", num_placeholders, "num_placeholders")


def postscript(text: str, postscript_marker: Any) -> Truth:
    """A mark of a postscript (P.S., P.P.S) occurs, in any case, also with spaces inside."""
    mark = _text(postscript_marker, "postscript_marker").strip().casefold()
    if mark.replace(" ", "").rstrip(".") not in ("p.s", "p.p.s"):
        return mark in text.casefold()
    letters = mark.replace(" ", "").rstrip(".").split(".")
    pattern = r"\.\s?".join(letters) + (r"\." if mark.endswith(".") else "")
    return re.search(rf"(?<!\w){pattern}", text.casefold()) is not None


def number_bullet_lists(text: str, num_bullets: Any) -> Truth:
    """Exactly so many items of bullet lists."""
    return compared(bullets(text), "exactly", num_bullets, "num_bullets")


def constrained_response(text: str) -> Truth:
    """One of the three answers of IFEval stands in the text; with two of them nobody can tell."""
    given = [option for option in _OPTIONS if option in text]
    return None if len(given) > 1 else bool(given)


def number_highlighted_sections(text: str, num_highlights: Any) -> Truth:
    """At least so many passages between asterisks, on one line each."""
    found = sum(bool(m[m.lastgroup or 0].strip()) for m in _MARKED.finditer(text))
    return compared(_just(found), "at least", num_highlights, "num_highlights")


def multiple_sections(text: str, section_spliter: Any, num_sections: Any) -> Truth:
    """At least so many sections, each with the mark and a number in front: Section 1."""
    mark = re.escape(_text(section_spliter, "section_spliter").strip())
    count = len(re.findall(rf"(?<!\w){mark}\s?\d+", text))
    return compared(_just(count), "at least", num_sections, "num_sections")


def json_format(text: str) -> Truth:
    """The whole text is JSON, bare or in one fence."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    fenced = _JSON_FENCE.fullmatch(text)
    try:
        # Numbers stay text: Python refuses long ones that JSON allows.
        json.loads(fenced["json"] if fenced else text, parse_constant=no_constant, parse_int=str)
    except RecursionError:
        return None
    except ValueError:
        return False
    return True


def title(text: str) -> Truth:
    """A title in double angular brackets: <<title>>."""
    return _TITLE.search(text) is not None


def two_responses(text: str) -> Truth:
    """Two different responses with six asterisks between them, and nothing else."""
    parts = [part.strip() for part in text.split("******")]
    inner = parts[1 if not parts[0] else 0 : -1 if not parts[-1] and len(parts) > 1 else None]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def starts_with(text: str, start: Any) -> Truth:
    """The text begins with another, in any case."""
    return text.strip().casefold().startswith(_text(start, "the start").strip().casefold())


def ends_with(text: str, end_phrase: Any) -> Truth:
    """The text ends with a phrase, in any case; a quotation mark behind it does not count."""
    wanted = _text(end_phrase, "end_phrase").strip().strip('"').casefold()
    return text.strip().strip('"').rstrip().casefold().endswith(wanted)


def quotation(text: str) -> Truth:
    """All of the text stands in double quotation marks."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        return True
    return None if text[:1] in "\u201c\u201f" and text[-1:] == "\u201d" else False


def capital_word_frequency(
    text: str, capital_frequency: Any, capital_relation: Any = None
) -> Truth:
    """So many words in capital letters."""
    return compared(capital_words(text), capital_relation, capital_frequency, "capital_frequency")


def english_capital(text: str) -> Truth:
    """No small letter, some capital ones, and not proved to be another language than English."""
    return text.isupper() and _english(text)


def english_lowercase(text: str) -> Truth:
    """No capital letter, some small ones, and not proved to be another language than English."""
    return text.islower() and _english(text)


def _english(text: str) -> Truth:
    try:
        return response_language(text, "en") is not False
    except Unusable:
        return None


def no_comma(text: str) -> Truth:
    """No comma; with commas of other scripts alone nobody can tell."""
    if "," in text:
        return False
    return None if _OTHER_COMMAS & set(text) else True


def first_word(text: str, first_word: Any) -> Truth:
    """The text begins with a word."""
    return _begins(text, first_word)


def last_word(text: str, last_word: Any) -> Truth:
    """The text ends with a word."""
    found = re.findall(r"[^\s.,!?;:\"'\u201c\u201d()\[\]*_`]+", text[-200:])
    return bool(found) and found[-1].casefold() == _text(last_word, "last_word").strip().casefold()


def no_mark(mark: str) -> Callable[[str], Truth]:
    """A check that a sign does not occur."""
    return lambda text: mark not in text


@dataclass(frozen=True)
class Check:
    """A check and its arguments.

    Attributes:
        run: Takes the text, and the arguments by name.
        needs: Names of the arguments, as published, that it can't do without.
        takes: Those that may be left out.
        renamed: Published names by those that `run` takes, where they differ.
    """

    run: Callable[..., Truth]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    renamed: Mapping[str, str] | None = None

    def __call__(self, text: str, given: Mapping[str, Any]) -> Truth:
        """Whether a text follows the instruction; None where nobody can tell.

        Raises:
            Unusable: if an argument is missing or is none.
        """
        lacking = [name for name in self.needs if given.get(name) is None]
        if lacking:
            raise Unusable(f"{', '.join(lacking)} is missing")
        names = self.renamed or {}
        found = {name: given[name] for name in (*self.needs, *self.takes) if name in given}
        return self.run(text, **{names.get(name, name): value for name, value in found.items()})


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(keywords_exist, ("keywords",)),
    "keywords:frequency": Check(keyword_frequency, ("keyword", "frequency"), ("relation",)),
    "keywords:forbidden_words": Check(forbidden_words, ("forbidden_words",)),
    "keywords:letter_frequency": Check(
        letter_frequency, ("letter", "let_frequency"), ("let_relation",)
    ),
    "language:response_language": Check(response_language, ("language",)),
    "length_constraints:number_sentences": Check(
        number_sentences, ("num_sentences",), ("relation",)
    ),
    "length_constraints:number_paragraphs": Check(number_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": Check(number_words, ("num_words",), ("relation",)),
    "length_constraints:nth_paragraph_first_word": Check(
        nth_paragraph_first_word, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": Check(number_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": Check(postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": Check(number_bullet_lists, ("num_bullets",)),
    "detectable_format:constrained_response": Check(constrained_response),
    "detectable_format:number_highlighted_sections": Check(
        number_highlighted_sections, ("num_highlights",)
    ),
    "detectable_format:multiple_sections": Check(
        multiple_sections, ("section_spliter", "num_sections")
    ),
    "detectable_format:json_format": Check(json_format),
    "detectable_format:title": Check(title),
    "combination:two_responses": Check(two_responses),
    "combination:repeat_prompt": Check(
        starts_with, ("prompt_to_repeat",), renamed={"prompt_to_repeat": "start"}
    ),
    "startend:end_checker": Check(ends_with, ("end_phrase",)),
    "startend:start_checker": Check(
        starts_with, ("start_phrase",), renamed={"start_phrase": "start"}
    ),
    "startend:quotation": Check(quotation),
    "multi-turn:constrained_start": Check(starts_with, ("starter",), renamed={"starter": "start"}),
    "change_case:capital_word_frequency": Check(
        capital_word_frequency, ("capital_frequency",), ("capital_relation",)
    ),
    "change_case:english_capital": Check(english_capital),
    "change_case:english_lowercase": Check(english_lowercase),
    "punctuation:no_comma": Check(no_comma),
    "punctuation:punctuation_dot": Check(no_mark(".")),
    "punctuation:punctuation_exclamation": Check(no_mark("!")),
    "first_word:first_word_answer": Check(first_word, ("first_word",)),
    "last_word:last_word_answer": Check(last_word, ("last_word",)),
}
"""Checks by their published name: those of IFEval; `startend:start_checker`, which is ours; and
the five last, which are in public sets that extend it."""
