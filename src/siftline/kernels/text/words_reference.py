"""The words of a text in plain Python: what `tokens` is tested against."""

from collections.abc import Callable

from siftline.kernels.text.codepoints import fold_reference
from siftline.kernels.text.signs import REACH

_OPERATORS, _ALWAYS = set("+*/^<=>|~&%"), set("#$@\\")
_OPEN, _CLOSE = set("([{"), set(")]}")
_PAD = " " * (REACH + 5)


def words_reference(text: str) -> list[str]:
    """The words and signs of a text in order."""
    folded = _PAD + fold_reference(text) + _PAD
    words: list[str] = []
    inside = False
    for k in range(len(_PAD), len(folded) - len(_PAD)):
        char = folded[k]
        if _is_word(char) or _joins(folded, k):
            words.append(words.pop() + char if inside else char)
            inside = True
        else:
            inside = False
            if not _is_sign(folded, k):
                continue
            if char == folded[k - 1] and _is_sign(folded, k - 1):
                words.append(words.pop() + char)
            else:
                words.append(char)
    return words


def _is_word(char: str) -> bool:
    return char.isalnum() if char.isascii() else True


def _is_letter(char: str) -> bool:
    return _is_word(char) and not _is_digit(char)


def _is_digit(char: str) -> bool:
    return char in "0123456789"


def _joins(text: str, k: int) -> bool:
    """Whether the punctuation at k is inside a word."""
    char, left, right = text[k], text[k - 1], text[k + 1]
    if char == "_":
        before, after = text[k - REACH : k].rstrip("_"), text[k + 1 : k + 1 + REACH].lstrip("_")
        return bool(before and after) and _is_word(before[-1]) and _is_word(after[0])
    letters, digits = _is_letter(left) and _is_letter(right), _is_digit(left) and _is_digit(right)
    return (char in ".'" and letters) or (char in ".',;" and digits)


def _is_sign(text: str, k: int) -> bool:
    char, left, right = text[k], text[k - 1], text[k + 1]
    if char in _OPERATORS or char in _ALWAYS:
        return True
    if char == ".":
        return _is_word(right) and not _is_word(left) and left not in ".\0"
    if char == ":":
        return _is_digit(left) and _is_digit(right)
    if char in "-!":
        return _is_operator(text, k)
    if char in _OPEN:
        before = _without(text[k + 1 - REACH : k][::-1], lambda c: "\0" < c <= " " or c in _OPEN)
        at = k - 1 - (REACH - 1 - before)
        return _is_operator(text, at)
    if char in _CLOSE:
        after = _without(text[k + 1 : k + REACH], lambda c: "\0" < c <= " " or c in _CLOSE)
        return _is_operator(text, k + 1 + (REACH - 1 - after))
    return False


def _without(text: str, skipped: Callable[[str], bool]) -> int:
    """How many characters are left of a text without the first that are skipped."""
    for k, char in enumerate(text):
        if not skipped(char):
            return len(text) - k
    return 0


def _is_operator(text: str, k: int) -> bool:
    char, left, right = text[k], text[k - 1], text[k + 1]
    if char == "!":
        if right in "=(" or _is_word(right) or left == ")" or _is_digit(left):
            return True
        after = text[_beside(text, k, 1)]
        return (after in _OPERATORS or after in _CLOSE or after in "-!") and _alone(text, k - 1)
    if char != "-":
        return char in _OPERATORS
    a, b = _beside(text, k, -1), _beside(text, k, 1)
    if _is_digit(text[b]) or (text[b] == "." and _is_digit(text[b + 1])):
        return True
    operand = _is_digit(text[a]) or text[a] in _CLOSE or _alone(text, a)
    if operand and (_alone(text, b) or text[b] in _OPEN or text[b] == "\\"):
        return True
    if _is_word(left) and _is_word(right):
        return False
    if _is_word(left):
        word = text[k - 4 : k]
        letters = len(word) - len(word.rstrip("abcdefghijklmnopqrstuvwxyz"))
        return _is_digit(left) or (letters in (1, 2) and not _is_word(word[-1 - letters]))
    if text[a] in _CLOSE or (left == "-" and text[k - 2] > " "):
        return False
    return _is_word(right) or right in _OPEN or right == "\\"


def _beside(text: str, k: int, step: int) -> int:
    """The nearest place before or after k that is no space."""
    at = k + step
    while abs(at - k) < REACH and "\0" < text[at] <= " ":
        at += step
    return at


def _alone(text: str, k: int) -> bool:
    """Whether there is a letter by itself at k, of a script that has words."""
    beside = (text[k - 1], text[k + 1])
    if not text[k].isascii() and "\0" in beside:
        return False
    return _is_letter(text[k]) and not any(map(_is_word, beside))
