"""The rules of Gopher, FineWeb and C4 about one text, as datatrove implements them.

datatrove's filters decide; that they say in words, so the number behind the decision is computed
here for the rows they remove, with their own counting functions and the words they saw. A text is
cut into words once: the filters get a tokenizer that remembers the last text.

Listed words in texts: what a user does not want to see, by a file of the user's own.

The number behind each of datatrove's rules: what a text has of it.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from siftline.kernels.text.words import words as plain_words
from siftline.scoring.measures.degenerate import REMEDY
from siftline.stages.quality_rules.decide import SHORT_LINE, Rules


class WordList:
    """Words and phrases to be found in texts, whatever their case and punctuation."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Takes one word or phrase a line; empty lines are none."""
        phrases = {tuple(found.split()) for line in lines if (found := plain_words(line))}
        if not phrases:
            raise ValueError("the word list has no word: give one word or phrase a line")
        self._phrases = phrases
        self._lengths = sorted({len(phrase) for phrase in phrases})

    def count(self, text: str) -> int:
        """How often the text has one of them; a word inside a longer one of the list counts too."""
        words = plain_words(text).split()
        return sum(
            tuple(words[i : i + n]) in self._phrases
            for n in self._lengths
            for i in range(len(words) - n + 1)
        )


Measure = Callable[[str, list[str], Rules], float]
"""From a text, its words and the rules of its language to a number."""
_LINES = re.compile("\n+")
_PARAGRAPHS = re.compile("\n{2,}")


def gram_share(words: list[str], n: int, text: str, *, top: bool) -> float:
    """Share of a text's characters in its commonest n-gram, or in n-grams that repeat one."""
    from datatrove.pipeline.filters import gopher_repetition_filter as gopher

    if top:
        return float(gopher.find_top_duplicate(gopher.get_n_grams(words, n)) / len(text))
    return float(gopher.find_all_duplicate(words, n) / len(text))


def spoken(words: Sequence[str]) -> list[str]:
    """Words that are not punctuation alone."""
    from datatrove.utils.text import PUNCTUATION_SET

    return [word for word in words if any(c not in PUNCTUATION_SET for c in word)]


def _repeats(parts: list[str]) -> tuple[int, int]:
    """How many parts repeat an earlier one, and their characters."""
    from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates

    count, characters = find_duplicates(parts)
    return int(count), int(characters)


def _dup_lines(text: str, words: list[str], rules: Rules) -> float:
    lines = _LINES.split(text)
    return _repeats(lines)[0] / len(lines)


def _dup_line_chars(text: str, words: list[str], rules: Rules) -> float:
    return _repeats(_LINES.split(text))[1] / len(text)


def _dup_paragraphs(text: str, words: list[str], rules: Rules) -> float:
    paragraphs = _PARAGRAPHS.split(text.strip())
    return _repeats(paragraphs)[0] / len(paragraphs)


def _dup_paragraph_chars(text: str, words: list[str], rules: Rules) -> float:
    return _repeats(_PARAGRAPHS.split(text.strip()))[1] / len(text)


def _full_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _punctuated_lines(text: str, words: list[str], rules: Rules) -> float:
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    lines = _full_lines(text)
    return sum(line.endswith(tuple(TERMINAL_PUNCTUATION)) for line in lines) / len(lines)


def _short_lines(text: str, words: list[str], rules: Rules) -> float:
    lines = _full_lines(text)
    return sum(len(line) <= SHORT_LINE for line in lines) / len(lines)


def _char_duplicates(text: str, words: list[str], rules: Rules) -> float:
    return _repeats(_full_lines(text))[1] / len(text.replace("\n", ""))


def _new_lines(text: str, words: list[str], rules: Rules) -> float:
    return text.count("\n") / len(words)


def _length(text: str, words: list[str], rules: Rules) -> float:
    return float(len(spoken(words)))


def _word_length(text: str, words: list[str], rules: Rules) -> float:
    said = spoken(words)
    return sum(map(len, said)) / len(said)


def _hashes(text: str, words: list[str], rules: Rules) -> float:
    return text.count("#") / len(words)


def _ellipses(text: str, words: list[str], rules: Rules) -> float:
    return (text.count("...") + text.count("…")) / len(words)


def _bullets(text: str, words: list[str], rules: Rules) -> float:
    lines = text.splitlines()
    return sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)


def _trailing(text: str, words: list[str], rules: Rules) -> float:
    lines = text.splitlines()
    return sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)


def _with_letter(text: str, words: list[str], rules: Rules) -> float:
    return sum(any(map(str.isalpha, word)) for word in words) / len(words)


def _stop_words(text: str, words: list[str], rules: Rules) -> float:
    return float(len(set(rules.stop_words) & set(words)))


MEASURES: dict[str, tuple[str, Measure]] = {
    "dup_para_frac": ("dup_para_frac", _dup_paragraphs),
    "dup_para_char_frac": ("dup_para_char_frac", _dup_paragraph_chars),
    "dup_line_frac": ("dup_line_frac", _dup_lines),
    "dup_line_char_frac": ("dup_line_char_frac", _dup_line_chars),
    "line_punct_ratio": ("line_punct_thr", _punctuated_lines),
    "short_line_ratio": ("short_line_thr", _short_lines),
    "char_dup_ratio": ("char_duplicates_ratio", _char_duplicates),
    "list_ratio": ("new_line_ratio", _new_lines),
    "gopher_short_doc": ("min_doc_words", _length),
    "gopher_long_doc": ("max_doc_words", _length),
    "gopher_below_avg_threshold": ("min_avg_word_length", _word_length),
    "gopher_above_avg_threshold": ("max_avg_word_length", _word_length),
    "gopher_too_many_hashes": ("max_symbol_word_ratio", _hashes),
    "gopher_too_many_ellipsis": ("max_symbol_word_ratio", _ellipses),
    "gopher_too_many_bullets": ("max_bullet_lines_ratio", _bullets),
    "gopher_too_many_end_ellipsis": ("max_ellipsis_lines_ratio", _trailing),
    "gopher_below_alpha_threshold": ("max_non_alpha_words_ratio", _with_letter),
    "gopher_enough_stop_words": ("min_stop_words", _stop_words),
}
"""By datatrove's name of a rule: the option with its threshold, and the number it looks at."""


LIBRARY = "datatrove"


@dataclass(frozen=True)
class Broken:
    """A rule that a text breaks: datatrove's name for it, the number it saw, and its threshold."""

    rule: str
    value: float
    threshold: float


class TextRules:
    """The rules of one language."""

    def __init__(self, language: str, rules: Rules) -> None:
        """Loads the filters and the language's word tokenizer; no network, no model.

        Args:
            language: Code, as "en".
            rules: Thresholds.

        Raises:
            ValueError: if datatrove, or what it cuts this language's words with, is not installed.
        """
        self._rules = rules
        self._words = _words_of(language)
        self._filters, self._bare = _filters(rules, self._words), _phrases(rules)
        self._document = _document()

    def judge(self, text: str) -> Broken | None:
        """The first rule that a text breaks, or None."""
        for rule in self._bare:
            verdict = rule.filter(self._document(text))
            if verdict is not True:
                found = "lorem ipsum" if verdict[1] == "lorem_ipsum" else "{"
                return Broken(verdict[1], float(text.lower().count(found)), 0.0)
        if len(text) < self._rules.min_words:  # fewer characters than words
            return None
        words = self._words.word_tokenize(text)
        if len(spoken(words)) < self._rules.min_words:
            return None
        for rule in self._filters:
            verdict = rule.filter(self._document(text))
            if verdict is not True:
                return self._explained(verdict[1], text, words)
        return None

    def _explained(self, rule: str, text: str, words: list[str]) -> Broken:
        gram = re.fullmatch(r"(top|duplicated)_(\d+)_(?:n_grams|gram)", rule)
        if gram:
            top = gram[1] == "top"
            shares = self._rules.top_n_grams if top else self._rules.dup_n_grams
            return Broken(rule, gram_share(words, int(gram[2]), text, top=top), shares[gram[2]])
        option, measure = MEASURES[rule]
        return Broken(rule, measure(text, words, self._rules), float(getattr(self._rules, option)))


def _words_of(language: str) -> Any:
    """The word tokenizer of a language, which remembers the words of the last text."""
    try:
        from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer
    except ImportError as error:
        raise ValueError(f"text rules need {LIBRARY}, which is not here: {REMEDY}") from error

    class Remembering(WordTokenizer):
        def __init__(self) -> None:
            super().__init__(language)
            self._inner = load_word_tokenizer(language)
            self._last: tuple[str, list[str]] = ("", [])

        def word_tokenize(self, text: str) -> list[str]:
            if self._last[0] != text:
                self._last = (text, self._inner.word_tokenize(text))
            return self._last[1]

        def sent_tokenize(self, text: str) -> list[str]:
            found: list[str] = self._inner.sent_tokenize(text)
            return found

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            found: list[tuple[int, int]] = self._inner.span_tokenize(text)
            return found

    try:
        tokenizer = Remembering()
        tokenizer.word_tokenize("a")
    except (ImportError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"no words of language {language!r}: {detail}") from error
    return tokenizer


def _document() -> Callable[[str], Any]:
    from datatrove.data import Document

    return lambda text: Document(text=text, id="")


def _filters(rules: Rules, words: Any) -> list[Any]:
    """The filters in FineWeb2's order: repetition, FineWeb, Gopher."""
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    def or_(value: float | None, off: float) -> float:
        return off if value is None else value

    grams = [
        tuple((int(n), share) for n, share in sorted(by.items(), key=lambda pair: int(pair[0])))
        for by in (rules.top_n_grams, rules.dup_n_grams)
    ]
    gopher = (
        "min_doc_words max_doc_words min_avg_word_length max_avg_word_length max_symbol_word_ratio "
        "max_bullet_lines_ratio max_ellipsis_lines_ratio max_non_alpha_words_ratio min_stop_words"
    )
    repetition = "dup_line_frac dup_para_frac dup_line_char_frac dup_para_char_frac"
    return [
        GopherRepetitionFilter(
            **{name: getattr(rules, name) for name in repetition.split()},
            top_n_grams=grams[0],
            dup_n_grams=grams[1],
            language=words,
        ),
        FineWebQualityFilter(
            line_punct_thr=or_(rules.line_punct_thr, 0.0),
            short_line_thr=or_(rules.short_line_thr, math.inf),
            short_line_length=SHORT_LINE,
            char_duplicates_ratio=or_(rules.char_duplicates_ratio, math.inf),
            new_line_ratio=or_(rules.new_line_ratio, math.inf),
            language=words,
        ),
        GopherQualityFilter(
            **{name: getattr(rules, name) for name in gopher.split()},
            stop_words=list(rules.stop_words),
            language=words,
        ),
    ]


def _phrases(rules: Rules) -> list[Any]:
    """C4's two rules about whole documents; its rules about lines would rewrite the text."""
    from datatrove.pipeline.filters import C4QualityFilter

    if not rules.lorem_ipsum and not rules.curly_bracket:
        return []
    return [
        C4QualityFilter(
            remove_citations=False,
            filter_no_terminal_punct=False,
            min_num_sentences=-1,
            min_words_per_line=-1,
            max_word_length=-1,
            filter_javascript=False,
            filter_policy=False,
            filter_lorem_ipsum=rules.lorem_ipsum,
            filter_curly_bracket=rules.curly_bracket,
        )
    ]
