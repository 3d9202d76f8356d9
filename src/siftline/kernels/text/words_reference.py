"""The words of a text in plain Python: what `tokens` is tested against."""

import re
from collections.abc import Callable

from siftline.kernels.text.codepoints import fold_reference
from siftline.kernels.text.roles import QUOTED, REACH, SPAN

_OPERATORS, _ALWAYS = set("+*/^<=>|~&%"), set("#$@\\")
_OPEN, _CLOSE = set("([{"), set(")]}")
_PAD = " " * (max(QUOTED, REACH, SPAN) + 5)
_BETWEEN_BRACKETS = re.compile(rf"[^()\[\]]{{0,{SPAN}}}(?=[()\[\]])")
_APART = re.compile(r"(?<![0-9])[,;]|[,;](?![0-9])")
_JOINED = re.compile(r"(?<=[0-9])[,;](?=[0-9])")
_SPACES = "".join(map(chr, range(1, 33)))


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
    if char == "'":
        return _is_prime(text, k)
    if _is_bound(text, k):
        return True
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


def _is_operator(text: str, k: int) -> bool:  # noqa: C901, a list of cases
    char, left, right = text[k], text[k - 1], text[k + 1]
    if char == "!":
        if right in "=(" or _is_word(right) or left == ")" or _is_digit(left):
            return True
        after = text[_beside(text, k, 1)]
        if (after in _OPERATORS or after in _CLOSE or after in "-!") and _alone(text, k - 1):
            return True
        if left == "!":
            once = text[k - 2] != "!" and right != "!"
            return once and (text[k - 2] == ")" or _is_operand(text, k - 2))
        return _is_operand(text, k - 1)
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


def _is_operand(text: str, k: int) -> bool:
    """Whether a factorial may stand behind what ends at k."""
    char, left = text[k], text[k - 1]
    if _is_digit(char):
        return True
    if char in "]}":
        return _is_digit(left) or _alone(text, k - 1)
    if not ("a" <= char <= "z") or char in "aio":
        return False
    if char == "n" and _is_digit(left):
        digits = text[k + 1 - REACH : k]
        rest = text[k - REACH] + digits.rstrip("0123456789")
        return not _is_word(rest[-1])
    if _is_word(left):
        return False
    if char in "kmnpqr":
        return left != "'"
    a = _beside(text, k, -1)
    if text[a] == "-":
        return _is_operator(text, a)
    return text[a] <= " " or text[a] in _OPERATORS or text[a] in _OPEN or text[a] == "$"


def _is_prime(text: str, k: int) -> bool:
    before = text[: k + 1].rstrip("'") if text[k - REACH : k].strip("'") else text[: k - REACH]
    after = text[k:].lstrip("'") if text[k : k + REACH].strip("'") else text[k + REACH :]
    char = before[-1]
    at = len(before) - 1
    lone = _alone(text, at)
    if not (lone or char in ")]") or _is_quoted(before[:-1][-QUOTED - 1 :] + char):
        return False
    if after[0] == "(" or after[0] in _OPERATORS:
        return True
    if char >= "\u0800":
        return False
    gap = re.match(rf"[{re.escape(_SPACES)}]{{0,{REACH - 1}}}", after)
    spaces = gap.end() if gap else 0
    end = len(text) - len(after) + spaces
    if text[end] in _OPERATORS:
        return True
    if text[end] == "-":
        operand = text[_beside(text, end, 1)]
        small = "a" <= operand <= "z" and _alone(text, _beside(text, end, 1))
        return _is_digit(operand) or operand in _OPEN or small
    if not lone or char in "aio" or not char.isascii():
        return False
    return "\0" < text[end] <= " " or after[0] in "$),.;?]}"


def _is_quoted(text: str) -> bool:
    """Whether the last quote of a text that is in no word is an opening one."""
    for k in range(len(text) - 2, 0, -1):
        left, right = text[k - 1], text[k + 1]
        if text[k] == "'" and not (_is_word(left) and _is_word(right)):
            opens = not (_is_word(left) or left == "'" or left in _CLOSE)
            return opens and not "\0" < right <= " "
    return False


def _is_bound(text: str, k: int) -> bool:
    """Whether the bracket at k is one of an interval."""
    if text[k] in "([]" and _is_interval(text, k):
        return True
    if text[k] not in ")][":
        return False
    places = [a for a in range(k - SPAN - 1, k) if text[a] in "()[]"]
    return bool(places) and text[places[-1]] != ")" and _is_interval(text, places[-1])


def _is_interval(text: str, k: int) -> bool:
    """Whether an interval that is open at one end, or has reversed brackets, starts at k."""
    found = _BETWEEN_BRACKETS.match(text, k + 1)
    if not found:
        return False
    inside, end = found[0], found.end()
    if text[k] == "]" and (text[k - 1] > " " and text[k - 1] not in "$:="):
        return False
    if text[k] == "]" and inside[:1] and inside[0] in _SPACES:
        return False
    sides = [side.strip(_SPACES) for side in _APART.split(inside)]
    two = len(sides) == 2 or (len(sides) == 1 and _JOINED.search(inside))
    if not two or not all(sides):
        return False
    for gap in re.finditer(rf"[{re.escape(_SPACES)}]+", inside.strip(_SPACES)):
        near = inside.strip(_SPACES)
        if _is_word(near[gap.start() - 1]) and _is_word(near[gap.end()]):
            return False
    if text[end] == "[" and (
        inside[-1] in _SPACES or (text[end + 1] > " " and text[end + 1] not in "!$),.:;?")
    ):
        return False
    return text[end] != "(" and text[k] + text[end] not in ("()", "[]")


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
