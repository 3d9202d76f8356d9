"""The number behind each of datatrove's rules: what a text has of it.

The counting functions, the punctuation marks and the words are datatrove's own, so that the number
lies on that side of the threshold on which its filter saw it.
"""

import re
from collections.abc import Callable, Sequence

from siftline.stages.quality_rules.decide import SHORT_LINE, Rules

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
