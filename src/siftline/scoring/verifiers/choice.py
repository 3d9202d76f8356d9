"""Which option a response chooses, by its letter."""

import re
from dataclasses import dataclass

from siftline.kernels.text.normalization import normalized
from siftline.scoring.answers.reasoning import without_reasoning
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_CHOICE = 1_000_000
"""Characters of a response beyond which no letter is looked for."""

_SHELL = re.compile(r"\\(?:text|mathrm|mathbf|mathsf|mbox|rm|bf)(?:bf|it|rm|sf)?\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[*`$\u200b\ufeff]|\\[()\[\]]|(?<!\w)_|_(?!\w)|</?(?:b|strong|em|i)>")
_NOUN = (
    r"(?:answer|ans|option|choice|alternative|selection|letter|respuesta|opci[oó]n|r[eé]ponse|antwort"
    r"|resposta|risposta|ответ|答案)"
)
_OF = r"(?:\s+(?:to|for|of|here)\b[^.:=\n]{0,80}?)?"
_BE = (
    r"(?:is|was|be|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be|es|est|ist|é|è"
    r"|(?P<could>(?:could|might|may|can)\s+be))"
)
_HEDGES = r"(?:probably|possibly|perhaps|maybe|likely|presumably|either|both)"
_FILLER = (
    rf"(?:(?P<hedged>{_HEDGES})\s+|(?:the|an?|clearly|indeed|simply|therefore|thus|hence|then"
    r"|correct|right|best|most|likely|one|letter|labell?ed|option|choice|answer|alternative)\s+"
    r"|[:]\s*){0,5}"
)
_OPENING = r"[(\[{\"'\u201c\u2018\u2019]{0,2}"
_LETTER = re.compile(
    rf"{_FILLER}(?P<open>{_OPENING})(?P<letter>[A-Za-z])(?![\w'\u2019+#])(?P<close>[)\]}}.:\"'\u201d\u2019]{{0,3}})",
    re.IGNORECASE,
)
_ALONE_AHEAD = rf"{_OPENING}[A-Za-z][)\].:\"']{{0,3}}"
_MARKS = (
    re.compile(
        rf"(?<!\w){_NOUN}(?:\s*\(s\))?{_OF}(?:[\"']?\s*(?:[:=]|->|→)|\s+{_BE}(?!\w)\s*:?|\s*[是为])\s*",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:i|we|i'd|i'll|let's|would|will|must|should|to)\s+"
        r"(?:choose|select|pick|go\s+with|opt\s+for)\s+",
        re.IGNORECASE,
    ),
    re.compile(r"[故应]?选择?\s*:?\s*(?=[A-Za-z(])"),
    re.compile(
        r"(?:^|[.!\n])[ \t]*(?:so|thus|therefore|hence)\b[, \t]+"
        r"(?:it(?:'s| is| must be)[ \t]+)?"
        rf"(?=(?:option |choice )?{_OPENING}[A-Za-z][)\].]{{0,2}}\s*(?:$|\n))",
        re.IGNORECASE,
    ),
    re.compile(
        r"^[ \t#>\-]*(?:\d+[.)][ \t]*)?(?:(?!not|wrong|incorrect)\w+[ \t]+){0,3}"
        rf"{_NOUN}[ \t]*:?[ \t]*\n\s*(?={_ALONE_AHEAD}(?:\s|$)|option |choice )",
        re.IGNORECASE | re.M,
    ),
    re.compile(r"(?<!#)####(?!#)[ \t]*"),
    re.compile(r"<(?:final_?)?answer>\s*", re.IGNORECASE),
    re.compile(r"\\boxed\s*\{\s*"),
)
"""What stands in front of a chosen letter."""
_IS_RIGHT = re.compile(
    r"(?<![\w'\u2019])(?:(?:option|choice|answer|alternative)\s+)?"
    r"(?P<open>[(\[\"']{0,2})(?P<letter>(?-i:[A-Z]))(?P<close>[)\]\"']{0,2})"
    r"(?:[.:,]?\s+[^.,;:\n]{0,60}?)??\s+(?:is|would be|must be|should be)\s+"
    r"(?:indeed\s+|clearly\s+|therefore\s+|thus\s+|hence\s+)?(?:the\s+)?(?:only\s+|most\s+|single\s+)?"
    r"(?:correct|right|best|true|accurate|appropriate)\b(?!\s+(?:if|when|about))",
    re.IGNORECASE,
)
"""Option B is correct; (B) Paris is the best answer."""
_WRONG = re.compile(
    r"\b(?:wrong|incorrect|false|worst|least|not|n't|never|previous|above)\s*$", re.I
)
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|whether|unless|imagine|wonder|why|how|some(?:one)?"
    r"\s+(?:say|might|may|think)s?)\b[^.!?\n]*$",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|(?<!most )likely|guess(?:ing)?|might|could"
    r"|not\s+(?:\w+\s+)?(?:sure|certain)|unsure|uncertain)\b[^.!?\n]*$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\bnot\s+(?:\w+\s+)?(?:sure|certain)\b|\bunsure\b|\buncertain\b|\b(?:just|only|wild) a guess\b"
    r"|\b(?:i(?:'m| am) guessing|could be wrong|can't tell|cannot tell)\b",
    re.IGNORECASE,
)
_SECOND = re.compile(
    r"\s*[,;]?\s*(?:(?:or|and|/|&|或|和)\s*|,\s*)(?:(?:else|also|maybe|perhaps|possibly|even|option|choice|both)"
    r"\s+){0,3}(?:[(\[\"']+[A-Za-z][)\]\"']|(?-i:[B-HJ-Z])(?![\w'\u2019])|(?-i:[AIa-z])(?=[\s.,;)]*(?:$|\n)))",
    re.IGNORECASE,
)
_ALSO = re.compile(
    r"[^.!?\n]{0,200}?\b(?:but|though|although|or|unless|if|otherwise|else)\b[^.!?\n]{0,200}?"
    r"(?:\b(?:could|might|maybe|perhaps|possibly|not sure|also)\b"
    r"|\b(?:or|else|otherwise)\s+\(?(?-i:[B-HJ-Z])\b)"
    r"|[^\n]{0,100}\b(?:and|or)\s+\(?(?-i:[A-Z])[).:]",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"\s*(?:$|[.,;:!?。、)\]}\n|/\u2013\u2014]|-(?!\w)"
    r"|(?:\s(?:because|since|as|rather|instead|over|not|for|due|which|that|and|or|but|with|by|if|in"
    r"|though|although|so)\b))|\s+[(\[]|\s*</|\s*<\|",
    re.IGNORECASE,
)
"""What may stand behind a letter that is a choice and no word."""
_NAMED = re.compile(r"\s+[A-Z0-9$\\]")
_OPTION_LINE = re.compile(r"^[ \t]*[(\[]?([A-Za-z])[)\].:][)\]]?[ \t]+\S", re.M)
_ALONE = re.compile(
    rf"(?:(?:option|choice|answer)\s+)?{_OPENING}([A-Za-z])[)\]}}.:\"'\u201d\u2019]{{0,3}}", re.I
)
_OPTION = re.compile(
    r"(?:option |choice )?[(\[]?(?P<letter>[A-Za-z])(?:[)\].:](?P<rest>.*)|)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_OPTION = re.compile(
    r"^\s*(?:or|and|/|,)\s*[(\[]?[A-Za-z][)\].:]?\s*$|[(\[][A-Z][)\]]|\n\s*[(\[]?[A-Za-z][)\].:]"
)
_SENTENCES = re.compile(r"[.!?]\s+\S")
"""More than one sentence: reasoning, which may end at another letter than it begins with."""
_JOINED = re.compile(r"\b(?:and|or|nor|neither)\s*$", re.I)
_DENIED = re.compile(r"\s*(?:is|are|was|isn't|can't|cannot|can|does|seems|would|could)\b", re.I)


@dataclass(frozen=True)
class Chosen:
    """What a text chooses.

    Attributes:
        letter: The last option that is named, in upper case; None if there is none.
        doubt: Why it is no choice: several, or not meant for sure; empty if it is one.
    """

    letter: str | None
    doubt: str = ""


class ChoiceVerifier:
    r"""Compares the letters of multiple-choice answers.

    Reasoning blocks are left out. The response's letter is the one that it marks: `#### B`,
    `\boxed{\text{B}}`, `<answer>B</answer>`, "the answer is (B)", `**Answer**: B`, "the correct
    option is B", "Option B is correct", a heading "Answer" with the letter on the next line; or
    that stands alone on its first or last line; or that the whole response is: `(b)`, `B. Paris`.

    A letter that only begins a word or a sentence ("A dog"), that is denied or supposed ("if the
    answer is A") is none. The verdict is open where marks name different letters, where two are
    named ("B or C"), and where the writer is not sure ("probably B", "B, but it could be C").
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        if len(response) > LONGEST_CHOICE:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        wanted, given = chosen(answer), chosen(without_reasoning(response))
        if wanted.letter is None or wanted.doubt:
            return Verdict(None, given.letter, "no_reference")
        if given.letter is None:
            return Verdict(None, None, "no_final_answer")
        if given.doubt:
            return Verdict(None, given.letter, f"unreadable: {given.doubt}")
        correct = given.letter == wanted.letter
        return Verdict(correct, given.letter, "match" if correct else "wrong_answer")


def chosen(text: str) -> Chosen:
    """The option that a text chooses; "A: Paris" is option A, and "A: B" an answer B."""
    text = _plain(text)
    if text[:2].upper() == "A:":
        behind = _marked(text[2:].lstrip())
        return behind if behind.letter else Chosen(_whole(text[2:]) or _whole(text))
    marked = _marked(text)
    return marked if marked.letter else Chosen(_whole(text))


def _plain(text: str) -> str:
    """The text without bold, code and mathematics marks."""
    text = normalized("NFKC", text)
    for _ in range(2):
        text = _SHELL.sub(r"\1", text)
    return _MARKUP.sub("", text).strip()


def _marked(text: str) -> Chosen:
    """The letter that marks agree on."""
    found: list[tuple[int, str, bool]] = []
    for pattern in _MARKS:
        for mark in pattern.finditer(text):
            named = _named(text, mark, "could" in pattern.groupindex and bool(mark["could"]))
            if named is not None:
                found.append(named)
    for mark in _IS_RIGHT.finditer(text):
        before = _before(text, mark.start())
        lone = mark["letter"] in "AI" and not mark["open"] and mark[0][:1] in "AI"
        if not (_SUPPOSED.search(before) or (lone and before.strip())):
            unsure = _UNSURE.search(before) or re.search(
                r"(?:and|or|nor|neither)\s*$", before, re.I
            )
            found.append((mark.start(), mark["letter"].upper(), bool(unsure)))
    found += _edges(text)
    if not found:
        return Chosen(None)
    found.sort()
    firm = [(place, letter) for place, letter, unsure in found if not unsure]
    last = found[-1]
    letters = list(dict.fromkeys(letter for _, letter in firm))
    if len(letters) > 1:
        return Chosen(last[1], f"several choices: {', '.join(sorted(letters))}")
    if last[2] or _TAKEN_BACK.search(text, last[0]):
        return Chosen(last[1], "the choice is not sure, or not one")
    return Chosen(letters[0])


def _named(text: str, mark: re.Match[str], unsure: bool) -> tuple[int, str, bool] | None:
    """Place and letter behind a mark, and whether it is in doubt; None where it names none."""
    found = _LETTER.match(text, mark.end())
    if found is None:
        return None
    letter, wrapped = found["letter"], bool(found["open"]) or found["close"][:1] in (")", ":", "]")
    rest = text[found.end() : found.end() + 300]
    begins = len(mark[0]) - len(mark[0].lstrip(".!\n \t"))
    before = _before(text, mark.start() + begins)
    named = letter.isupper() and letter not in "AI" and _NAMED.match(rest)
    if not (wrapped or found["close"] or named or _BEHIND.match(rest)):
        return None
    if rest.lstrip()[:1] == "?" or _WRONG.search(before) or _SUPPOSED.search(before):
        return None
    doubt = unsure or found["hedged"] or _UNSURE.search(before)
    doubt = doubt or _SECOND.match(rest) or _ALSO.match(rest)
    if _lists(text, found.start("letter")):
        return None
    return mark.start(), letter.upper(), bool(doubt)


def _before(text: str, place: int) -> str:
    """What stands in front of a place in its sentence, the last 120 characters of it."""
    before = text[max(0, place - 120) : place]
    return re.split(r"[.!?。\n]", before)[-1]


def _lists(text: str, place: int) -> bool:
    """Whether the option at a place begins a list of them: the line behind names the next one."""
    _, newline, behind = text[place : place + 300].partition("\n")
    following = _OPTION_LINE.match(behind.lstrip("\n")) if newline else None
    return following is not None and following[1].upper() == chr(ord(text[place].upper()) + 1)


def _edges(text: str) -> list[tuple[int, str, bool]]:
    """Letters that have the first or the last line for themselves."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        return []
    found = []
    for place, line in ((0, lines[0]), (len(text), lines[-1])):
        alone = _ALONE.fullmatch(line)
        if alone:
            found.append((place, alone[1].upper(), False))
    if not found and not _lists(text, 0) and len({*_OPTION_LINE.findall(text)}) == 1:
        first = _OPTION.fullmatch(lines[0])
        rest = (first["rest"] or "") if first else ""
        if first and not (_SENTENCES.search(rest) or _DENIED.match(rest) or _SECOND.match(rest)):
            found.append((0, first["letter"].upper(), False))
    return found


def _whole(text: str) -> str | None:
    """The letter of an option as it is written in front of it; None where there is not just one."""
    text = text.strip().strip("\"' ")
    found = _OPTION.fullmatch(text)
    rest = found["rest"] or "" if found else ""
    if found is None or _OTHER_OPTION.search(rest) or _SENTENCES.search(rest):
        return None
    return None if _DENIED.match(rest) else found["letter"].upper()
