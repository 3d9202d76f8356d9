"""MTLD: how many words a text goes on for before it repeats itself (McCarthy & Jarvis 2010).

Read word by word, the share of distinct words falls; where it reaches 0.72 a factor is full and the
count starts again. The measure is words per factor, what is left at the end counting as a part of
one, and the mean of reading forwards and backwards. Below about 100 words it is noisy.
"""

import re
from collections.abc import Iterable, Sequence

HUNDREDTHS = 72
"""Share of distinct words that ends a factor, in hundredths: 18 of 25 words reach it exactly."""
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words_of(text: str) -> list[str]:
    """Words of a text in lower case: letters, digits, and apostrophes between them."""
    return _WORD.findall(text.lower())


def mtld(words: Sequence[str]) -> float | None:
    """The measure of a text.

    Args:
        words: Its words, compared as they are.

    Returns:
        Words per factor, the mean of both directions. Where no word comes twice no factor begins;
        the text then counts as one, so its number of words is given, the least it can be. None for
        no words.
    """
    if not words:
        return None
    return (_one_way(words) + _one_way(reversed(words))) / 2


def _one_way(words: Iterable[str]) -> float:
    seen: set[str] = set()
    read = factors = total = 0
    for word in words:
        seen.add(word)
        read += 1
        total += 1
        if 100 * len(seen) <= HUNDREDTHS * read:
            factors += 1
            seen, read = set(), 0
    part = 0.0 if not read else (1 - len(seen) / read) / (1 - HUNDREDTHS / 100)
    return total / (factors + part) if factors + part > 0 else float(total)
