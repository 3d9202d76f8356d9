"""Text reduced to what duplicate and overlap tests compare: strings in, strings and arrays out.

`words` is the one canonical form: what `tokens` says a word or sign is, joined by single spaces.
`numbers` keeps of it the quantities and operators in order, so that two instances of one word
problem template are told apart however similar the words around the numbers are. `plain` serves
reference answers, where all punctuation counts.

MTLD: how many words a text goes on for before it repeats itself (McCarthy & Jarvis 2010).
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from siftline.kernels.text.codepoints import tables
from siftline.kernels.text.normalization import normalized

NUMBER_WORDS = frozenset(
    (  # noqa: SIM905, forty lines as a list
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
        "eighty ninety hundred thousand million billion half quarter third dozen twice double "
        "triple thrice "
        "ii iii iv vi vii viii ix xi xii xiii xiv xv xvi xvii xviii xix xx xxi xxii xxiii xxiv xxv"
    ).split()
)
_NUMBER = re.compile(r"\d+(?:[.,;']\d+)*", re.ASCII)
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))", re.ASCII)
_ALWAYS, _BESIDE = tuple("<>=!^+."), tuple("-*/~|&")
_QUANTITY_SIGNS = (
    (0xA2, 0xA5),  # currency
    (0xB0, 0xB1),  # degrees, plus or minus
    (0x2030, 0x2031),  # per mille
    (0x20A0, 0x20CF),  # currency
    (0x2200, 0x22FF),  # mathematical operators
)


class WordTexts(NamedTuple):
    """The words of n texts as UTF-8.

    Attributes:
        data: uint8: words with a space between them, text after text.
        offsets: int64, shape (n + 1,): where each text starts.
    """

    data: np.ndarray
    offsets: np.ndarray

    def strings(self) -> list[str]:
        """The texts as strings."""
        whole = self.data.tobytes()
        return [whole[a:b].decode() for a, b in pairwise(self.offsets.tolist())]


def words_of(texts: Sequence[str]) -> WordTexts:
    """The words of each text; see `words`."""
    from siftline.kernels.text import word_loops

    # A lone surrogate is not valid UTF-8 but does occur in scraped JSON; it parts words.
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.cumsum([0, *map(len, raw)], dtype=np.int64)
    data = np.frombuffer(b"".join(raw), np.uint8)
    return WordTexts(*word_loops.words_of(data, offsets, tables()))


def words(text: str) -> str:
    """The words and signs of a text (`kernels.text.words.tokens`) joined by single spaces."""
    (found,) = words_of([text]).strings()
    return found


def plain(text: str) -> str:
    """Folds compatibility forms (NFKC), case and runs of white space; keeps punctuation."""
    return " ".join(normalized("NFKC", text).casefold().split())


def numbers(text: str) -> tuple[str, ...]:
    """The quantities and operators of a text in order.

    Numbers count, without thousands separators, wherever they stand ("x2" has one); so do English
    number words ("half", "twice"), Roman numerals of more than a letter, signs before a number and
    currency, "%" or degrees behind one; and where no number is, comparisons, "+", "^", "." and "!"
    but at the end, "&&" and "||", other operators beside a single letter, and "#" behind one.
    Dashes, bullets and slashes of prose do not.

    Args:
        text: Output of `words`.
    """
    tokens = text.split(" ")
    found: list[str] = []
    leads = _before_numbers(tokens)
    for k, token in enumerate(tokens):
        runs = [_THOUSANDS.sub("", run) for run in _NUMBER.findall(token)]
        if runs:
            found += runs
        elif (
            token in NUMBER_WORDS
            or leads[k]
            or (token.startswith(_ALWAYS) and (token[0] != "!" or k + 1 < len(tokens)))
            or _of_quantity(tokens, k)
            or _of_letters(tokens, k)
        ):
            found.append(token)
    return tuple(found)


def _before_numbers(tokens: list[str]) -> list[bool]:
    """Whether signs alone stand between a sign and a number behind it."""
    leads, ahead = [False] * len(tokens), False
    for k in range(len(tokens) - 1, -1, -1):
        leads[k] = ahead and _is_sign(tokens[k])
        ahead = leads[k] or bool(_NUMBER.search(tokens[k]))
    return leads


def _is_sign(token: str) -> bool:
    return token.startswith((*"+-*/^<>=~([{$", *")]}")) or _is_quantity_sign(token)


def _is_quantity_sign(token: str) -> bool:
    return bool(token) and any(a <= ord(token[0]) <= b for a, b in _QUANTITY_SIGNS)


def _of_quantity(tokens: list[str], k: int) -> bool:
    behind = k > 0 and bool(_NUMBER.search(tokens[k - 1]))
    return behind and (tokens[k].startswith("%") or _is_quantity_sign(tokens[k]))


def _of_letters(tokens: list[str], k: int) -> bool:
    before, after = (_is_letter(tokens, k - 1), _is_letter(tokens, k + 1))
    if tokens[k].startswith("#"):
        return before
    return tokens[k] in ("&&", "||") or (tokens[k].startswith(_BESIDE) and (before or after))


def _is_letter(tokens: list[str], k: int) -> bool:
    return 0 <= k < len(tokens) and len(tokens[k]) == 1 and "a" <= tokens[k] <= "z"


HUNDREDTHS = 72
"""Share of distinct words that ends a factor, in hundredths: 18 of 25 words reach it exactly."""
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def mtld_words(text: str) -> list[str]:
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
