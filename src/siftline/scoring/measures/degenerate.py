"""Responses that are no text to learn from: cut off, going in circles, or in another script.

Every rule is a plain property of the text, decided without a model. They are set to spare short
answers and worked solutions; what they find, they find surely, and they miss more than they find.

The language of a text, from a model that comes inside a package: nothing is downloaded.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from siftline.kernels.text.normalization import normalized
from siftline.scoring.answers.reasoning import blocks

Reason = Literal["truncated", "repetitive", "wrong_language"]

LEAST_WORDS = 50
"""Words from which on shares of repeated text mean something: Gopher's least document."""
DUPLICATE_LINES = 0.30
DUPLICATE_LINE_CHARACTERS = 0.20
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Most of a text that repeated lines, and repeated word n-grams, may be: table A1 of Gopher
(Rae et al. 2021, arXiv 2112.11446), set for web pages. A first occurrence is no repetition."""
NGRAM_LENIENCY = 4.0
"""Factor on the n-gram thresholds: solutions name the same things in every step. Of GSM8K's 8,792
answers the most repetitive reaches 3.3."""
LOOP_ROUNDS = 5
"""Times the same words may follow on each other at the end, as a model that is stuck writes."""
LOOP_PERIOD = 40
"""Longest such round in words."""
LEAST_LETTERS = 20
"""Letters from which on a text has a script."""
DOMINANT = 0.7
"""Share of the letters that makes a script the text's own."""
FAMILIAR = 0.1
"""Share of the prompt's letters in the response's script above which it is expected."""

LAST_CHARACTERS = 1000
"""Characters at the end of a line in which emphasis is looked for: its end is all that counts."""

_WORD = re.compile(r"\w+(?:['.,]\w+)*|[^\w\s]+")
_ENDING = re.compile(
    r"[.!?:;)\]}\"'*_`|>$%\u2019\u201d\u00bb\u3002\uff01\uff1f\u2026\u3001\uff09\u3011]\s*$"
)
_PROSE_LINE = re.compile(r"[A-Za-z][^\n]*")
_OPEN_WORDS = frozenset(["a", "an", "and", "because", "but", "if", "or", "than", "the"])
_DANGLING = re.compile(r"(?:(?<=[\s\d])\*|(?<=\s)[-+]|[-+*/=]\s*[\d.]+\+|[=,(\[{<\\])$")
"""An end on an operator: a sum's, not the sign of C++, A+, 18+ or the end of bold."""
_EMPHASIS = re.compile(r"(?<!\w)([*_]{1,3})(?=\S)(.*?\S)\1(?!\w)")
_NAMED = re.compile(r"(?:\b(?:is|be|option|choice|answer|letter)|:)\s+a$")
"""A choice's letter at the end, which is no article."""
_FORMULA = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\[a-zA-Z]+|`[^`\n]*`|https?://\S+|<<[^<>]*>>", re.S
)
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "CJK": "CJK", "IDEOGRAPHIC": "CJK"}


def degenerate(response: str, prompt: str) -> Reason | None:
    r"""Says what is wrong with a response as a text, the first that fits; None for a sound one.

    - `repetitive`: from 50 words on, shares of repeated lines and word n-grams above Gopher's
      thresholds (n-grams: four times these, see `NGRAM_LENIENCY`); at any length, the same words
      five times in a row and more at the end.
    - `truncated`: a fenced block, `\boxed{` or `<<` that nothing closes; an end on an operator, an
      open bracket, a comma or a word such as "the"; a last sentence without its end, where the
      sentences before it have theirs.
    - `wrong_language`: the letters outside code and formulas are mostly of one Unicode script, and
      less than a tenth of the prompt's are. Scripts only: English for French is not seen, Chinese
      and Japanese are one, and a translation into another script is wrong too unless the prompt
      shows that script; leave the rule out for such data.

    Args:
        response: The response's text; an empty one is not degenerate.
        prompt: What it answers.
    """
    if not response.strip():
        return None
    if _repetitive(response):
        return "repetitive"  # before the other, for what goes in circles is cut in the end
    if _truncated(response):
        return "truncated"
    return "wrong_language" if _foreign(response, prompt) else None


def _truncated(response: str) -> bool:
    fenced = blocks(response)
    if (fenced and not fenced[-1].closed) or _unclosed(response, "\\boxed{"):
        return True
    text = response.rstrip()
    if text.rfind("<<") > text.rfind(">>") and "=" in text[text.rfind("<<") :]:
        return True
    if fenced and text.endswith(("`", "~")):
        return False
    last = text.rsplit("\n", 1)[-1].strip()
    words = last.split()
    if len(words) < 2 or last.startswith(("#", "|")):
        return False
    if _DANGLING.search(_EMPHASIS.sub(r"\2", last[-LAST_CHARACTERS:])):
        return True
    if words[-1] in _OPEN_WORDS and len(words) > 3 and not _NAMED.search(last):
        return True
    return _sentence_without_end(text, last)


def _unclosed(text: str, opening: str) -> bool:
    """Whether the last such brace is never closed."""
    start = text.rfind(opening)
    if start < 0:
        return False
    depth = 0
    for character in text[start + len(opening) - 1 :]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return False
    return True


def _sentence_without_end(text: str, last: str) -> bool:
    """Whether the last line stops inside a sentence although this text ends its sentences.

    Only a line of prose that holds a finished sentence, or stands behind lines that are finished,
    has to end: headings, list items, names and bare answers have no full stop.
    """
    if _ENDING.search(last) or not last[-1].isalpha() or not _PROSE_LINE.match(last):
        return False
    before = [line.strip() for line in text.split("\n")[:-1] if line.strip()]
    inside = len(re.findall(r"[a-z]{2}[.!?] +[A-Z]", last))
    ended = sum(_ENDING.search(line) is not None for line in before)
    finished = inside >= 2 or (len(before) >= 2 and ended == len(before))
    open_part = re.split(r"[.!?] ", last)[-1]
    return finished and len(open_part.split()) >= 3


def _repetitive(response: str) -> bool:
    words = [word.lower() for word in _WORD.findall(response)]
    if _loops(words):
        return True
    if len(words) < LEAST_WORDS:
        return False
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    again = [line for line, first in zip(lines, _firsts(lines), strict=True) if not first]
    if len(lines) > 3 and len(again) / len(lines) > DUPLICATE_LINES:
        return True
    characters = sum(map(len, lines))
    if len(lines) > 3 and sum(map(len, again)) / characters > DUPLICATE_LINE_CHARACTERS:
        return True
    return any(
        _repeated_share(words, n) > NGRAM_LENIENCY * threshold
        for n, threshold in DUPLICATE_NGRAMS.items()
    )


def _firsts(items: Sequence[str]) -> Iterator[bool]:
    seen: set[str] = set()
    for item in items:
        yield item not in seen
        seen.add(item)


def _repeated_share(words: Sequence[str], n: int) -> float:
    """Share of the characters in word n-grams that were there before, overlaps counted once."""
    seen: set[tuple[str, ...]] = set()
    again = [False] * len(words)
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            again[i : i + n] = [True] * n
        seen.add(gram)
    total = sum(map(len, words))
    return sum(len(w) for w, c in zip(words, again, strict=True) if c) / total if total else 0.0


def _loops(words: Sequence[str]) -> bool:
    """Whether the text ends in the same words again and again; the last round may be cut."""
    for period in range(1, min(LOOP_PERIOD, len(words) // LOOP_ROUNDS) + 1):
        run = 0
        while run + period < len(words) and words[-1 - run] == words[-1 - run - period]:
            run += 1
        rounds = (run + period) // period
        spelled = any(word.isalpha() for word in words[-period:])
        # One word five times is emphasis; numbers and signs repeat in tables and sums.
        if rounds >= LOOP_ROUNDS * (2 if period == 1 else 1) and spelled:
            return True
    return False


def _foreign(response: str, prompt: str) -> bool:
    given, asked = _scripts(response), _scripts(prompt)
    letters, wanted = sum(given.values()), sum(asked.values())
    if letters < LEAST_LETTERS or wanted < LEAST_LETTERS:
        return False
    script, count = max(given.items(), key=lambda item: (item[1], item[0]))
    return count / letters >= DOMINANT and asked[script] / wanted < FAMILIAR


def _without_blocks(text: str) -> str:
    """What stands outside fenced code, each block found behind the one before it."""
    parts, at = [], 0
    for block in blocks(text):
        start = text.find(block.text, at) if block.text.strip() else -1
        if start >= 0:
            parts.append(text[at:start])
            at = start + len(block.text)
    return " ".join([*parts, text[at:]])


def _scripts(text: str) -> Counter[str]:
    """Letters by script, outside fenced code, formulas, inline code and addresses."""
    counts: Counter[str] = Counter()
    prose = _FORMULA.sub(" ", _without_blocks(text))
    for character, times in Counter(normalized("NFKC", prose)).items():
        if character.isalpha():
            script = unicodedata.name(character, "UNKNOWN").partition(" ")[0].partition("-")[0]
            counts[_SAME_SCRIPT.get(script, script)] += times
    return counts


REMEDY = "pip install 'siftline[quality]'"
LIBRARY = "py3langid"


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(f"languages need {LIBRARY}, which is not here: {REMEDY}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> list[str]:
    """Codes that a text can be given, sorted.

    Raises:
        ValueError: if the package is not installed.
    """
    return sorted(_identifier().labels)


def probabilities(text: str) -> Mapping[str, float]:
    """Probability of each language, the likeliest first; equal ones by code.

    Raises:
        ValueError: if the package is not installed.
    """
    ranked = _identifier().rank(text)
    return dict(sorted(ranked, key=lambda pair: (-pair[1], pair[0])))


def distinct(text: str) -> str:
    """The words of a text, each once, in the order they come."""
    return " ".join(dict.fromkeys(text.split()))


def letters(text: str) -> int:
    """Letters of a text: what its language can be told from."""
    return sum(map(str.isalpha, text))
