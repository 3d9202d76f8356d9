r"""Finding the final answer of a response: which span it is. What it is worth is judged elsewhere.

Only what a writer marks on purpose counts: `\boxed{x}`, `#### x`, `<answer>x</answer>`, "the answer
is x", a heading "Final Answer" with the answer on the next line. The usual fall-back, the last
number in the text, calls a truncated or a wrong chain of thought an answer, so it is there only for
reading and never used to make or to judge data (dart-math ends with it by default; see its strict
switch).

Reasoning is left out first. Boxes that stand in one list are one answer, which is the list. Marks
that give several answers are all candidates: nobody can tell which of them is meant, so a judge
may say right only where all of them are. Every function is linear in the length of the text.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator

from siftline.scoring.answers.quantities import NUMBER, answer_key, parse_quantity
from siftline.scoring.answers.reasoning import without_reasoning
from siftline.scoring.answers.steps import Candidate, without_steps

__all__ = [
    "Candidate",
    "answer_key",
    "extract_answer",
    "find_answers",
    "is_value",
    "parse_quantity",
]

MOST_CANDIDATES = 8
"""Different answers beyond which a response has none."""
MOST_PHRASES = 200
"""Phrases of a response that are looked at, the last ones: who says it more often says nothing."""
LONGEST_ANSWER = 1000
"""Characters of a marked answer beyond which it is cut: what is longer is no answer."""

_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<(answer|final_answer)>", re.IGNORECASE)
_BARE_BOX = re.compile(r"\\boxed\s+(-?\d[\d.,/]*)")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_CRY = re.compile(r"(\d)!+$")
"""Behind #### stands a plain number, so a mark behind it is no factorial."""
_NAME = re.compile(r"(?<![A-Za-z])answers?(?![A-Za-z])|答案", re.IGNORECASE)
_MARKUP = r"(?:\*{1,3}|_{1,3}|`|\})?"
_LINK = re.compile(
    rf"{_MARKUP}[ \t]*"
    r"(?:(?:to|of|for|in) (?:the|this|that|your|our|part|question|problem)\b[^.:=\n]{0,80}?[ \t]+)?"
    r"(?:(?P<verb>(?:is|are|was|be|equals|becomes)\b|(?:must|should|would|will) be\b|=|是|为)"
    rf"[ \t]*{_MARKUP}[ \t]*[:\uff1a]?|[:\uff1a])[ \t]*{_MARKUP}[ \t]*[:\uff1a]?[ \t]*",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"{_MARKUP}[ \t]*[:\uff1a.]?[ \t]*{_MARKUP}[ \t]*(?=\n|$)")
"""Behind a heading: nothing more on its line."""
_HEADING = re.compile(
    r"[\s#>*_`\-=\u2600-\u27bf\U0001f300-\U0001faff\ufe0f]*(?:\d+[.)]\s*)?(?:\\text(?:bf)?\{)?"
    r"(?:(?:so|and|thus|therefore|hence|the|my|our|your|final|correct|short|numerical)[,\s]*)*",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:if|suppose|supposing|whether|assume|assuming|unless|maybe|perhaps|possibly|imagine|"
    r"say|would|might|could)\b[^.!?\n]*$|\bnot (?:sure|certain)\b[^.!?\n]*$",
    re.IGNORECASE,
)
"""In front of a phrase: what follows is supposed, not said."""
_LINE_A = re.compile(r"^[ \t]*A:[ \t]*", re.IGNORECASE | re.M)
_LINE_B = re.compile(r"^[ \t]*B[:.)]", re.M)
"""A line of a second choice: then "A:" begins the first one, and no answer."""
_SENTENCE_END = re.compile(r"[.?](?=\s|$|</\w+>)|</\w+>|(?<=[A-Za-z]{2})!(?=\s|$)|。")
_BOLD = re.compile(r"(?<![\w)])\*{2,3}|\*{2,3}(?![\w(])")
_FILLER = re.compile(
    r"(?:therefore|thus|then|simply|just|hence|indeed|clearly|exactly|also|still|actually|now|"
    r"equal to|given by|found to be|as follows|that|[:\uff1a,])[\s:\uff1a,]+",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"^(?:the|he|she|it|they|there|we|you|[A-Z][a-z]+)\b[a-z ]{0,40}?"
    r"(?:is|are|was|has|have|had|gets|pays|needs|costs|earns|makes|takes):? "
    r"(?=(?:\$|\\\(|\*\*)?[-+$€£¥₹]?\d)",
    re.IGNORECASE,
)
"""What an answer in a sentence begins with, before its number: the total is 18."""
_COMPUTED = re.compile(r"(?=[(\s]*[-$€£¥₹]{0,2}\d)(?![^=]*\d[A-Za-z])(?![^=]*\\)[^=]*=.*?([^=<>]+)")
"""A computation with its result: 12 * 3 = 36."""
_DISPLAYS = {"\\[": "\\]", "$$": "$$", "\\(": "\\)", "$": "$"}
_ENVIRONMENT = re.compile(r"\\begin\{(equation|align|gather|displaymath)(\*?)\}")
_GAP = re.compile(
    r"\\(?:text|mbox|textrm)\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:q?quad|[()\[\],;: ])|\$+|\*+"
    r"|\b(?:and|or|as well as)\b|(?:\\(?:theta|alpha|beta|lambda)|\b[A-Za-z](?:_\{?\w\}?)?)\s*="
    r"|[\s,;&\-\u2022]"
)
"""What may stand between the boxes of one list."""
_LONGEST_GAP = 80
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.])-?[$€£]?(?:{NUMBER})(?:/\d+)?")


def find_answers(response: str) -> tuple[Candidate, ...]:
    r"""Finds every answer that a response may mean as its final one, in the order of the text.

    Boxes (but for those of steps, see `steps`), `####` lines, tags and "final answer" marks
    count alike, and so do plain phrases ("the answer is x", "answer: x", a line "A: x") behind the
    last of those, or where there is none. A `####` line counts when nothing follows it or when it
    holds a bare number, since `####` is a Markdown heading too. A phrase counts when what it names
    looks like a value, or is the last.

    Args:
        response: The response's text.

    Returns:
        Candidates with different texts; empty where nothing is marked, or far too much is.
    """
    text = without_reasoning(response)
    phrases = [p for p in _phrases(text) if "\\boxed" not in p[0].text]
    valued = [(found, final) for found, final in phrases if is_value(found.text)]
    others = list(_after_hashes(text)) + list(_tagged(text))
    others += [found for found, final in valued if final]
    boxes = list(_lists(_boxes(text), text))
    strong = list(without_steps(boxes, [found.start for found in others], text)) + others
    edge = max((found.start for found in strong), default=-1)
    weak = [found for found, final in valued if not final and found.start > edge]
    if not strong and phrases:
        weak.append(max(phrases, key=lambda phrase: phrase[0].start)[0])
    distinct: dict[str, Candidate] = {}
    for found in sorted(strong + weak, key=lambda found: found.start):
        distinct.pop(found.text, None)  # the last place of an answer counts
        distinct[found.text] = found
    return tuple(distinct.values()) if len(distinct) <= MOST_CANDIDATES else ()


def extract_answer(response: str, strict: bool = True) -> str | None:
    """The last answer that a response marks as its final one, as written; None without one.

    Args:
        response: The response's text.
        strict: Only marked answers. False falls back to the last number in the text, which is
            right for display and wrong for judging (see the module's docstring).
    """
    found = find_answers(response)
    if found or strict:
        return found[-1].text if found else None
    numbers = _NUMBER_IN_TEXT.findall(without_reasoning(response))
    return numbers[-1] if numbers else None


def is_value(text: str) -> bool:
    """Whether an answer looks like a value rather than the beginning of a sentence."""
    if len(text) > 200:
        return False
    if parse_quantity(text) is not None or re.match(r"[-+]?[$€£¥₹]?\d", text.strip("*_ ")):
        return True
    bare = re.sub(r"\\[A-Za-z]+|\\(?:text|mathrm)\{[^{}]*\}|\$[^$]*\$|\\\(.*?\\\)", " ", text)
    words = re.findall(r"[A-Za-z]{2,}", bare)
    return not [w for w in words if w not in ("and", "or", "sin", "cos", "pi", "sqrt", "log", "ln")]


def _after_hashes(text: str) -> Iterator[Candidate]:
    last = len(text.rstrip())
    for match in deque(_HASHES.finditer(text), MOST_PHRASES):
        payload = _CRY.sub(r"\1", match[1].strip())
        if not payload or "\\boxed" in payload or _NAME.search(payload):
            continue  # what stands in it is a mark of its own
        if match.end() >= last or parse_quantity(payload) is not None:
            yield Candidate(match.start(), match.end(), payload[:LONGEST_ANSWER])


def _tagged(text: str) -> Iterator[Candidate]:
    """Answers between tags: <answer>12</answer>. Marks inside of one are marks of their own."""
    for match in deque(_TAG.finditer(text), MOST_PHRASES):
        inside = text[match.end() : match.end() + LONGEST_ANSWER]
        payload, closing, _ = inside.partition(f"</{match[1]}>")
        marked = "\\boxed" in payload or "####" in payload or _NAME.search(payload)
        if closing and payload.strip() and not marked and "\n" not in payload.strip():
            yield Candidate(match.start(), match.end() + len(payload), payload.strip())


def _boxes(text: str) -> list[Candidate]:
    """The outermost balanced boxes, in order. One pass: every brace is looked at once."""
    stack: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, int]] = []
    for match in _BRACES.finditer(text):
        mark = match[0]
        if mark == "{":
            stack.append(None)
        elif mark[0] == "\\" and mark[-1] == "{" and len(mark) > 2:
            stack.append((match.start(), match.end()))
        elif mark == "}" and stack:
            opened = stack.pop()
            if opened is not None:
                found.append((opened[0], opened[1], match.start()))
    found += [(m.start(), m.start(1), m.end()) for m in _BARE_BOX.finditer(text)]
    boxes: list[Candidate] = []
    edge = -1
    for start, inside, end in sorted(found, key=lambda box: (box[0], -box[2])):
        payload = _unwrapped(text[inside : min(end, inside + LONGEST_ANSWER)])
        if start >= edge and payload:
            minus = re.search(r"[=$(]\s*[-\u2212]\s*$", text[max(0, start - 8) : start])
            payload = f"-({payload})" if minus else payload
            boxes.append(Candidate(start, end + 1, payload))
            edge = end
    return boxes


def _unwrapped(payload: str) -> str:
    r"""A box's content without boxes inside it and without braces around all of it."""
    payload = re.sub(r"\\(?:boxed|fbox|framebox)\s*\{", "{", payload).strip()
    while payload.startswith("{") and payload.endswith("}"):
        depth = 0
        for place, mark in enumerate(payload):
            depth += {"{": 1, "}": -1}.get(mark, 0)
            if not depth and place < len(payload) - 1:
                return payload
        payload = payload[1:-1].strip()
    return payload


def _lists(boxes: Iterable[Candidate], text: str) -> Iterator[Candidate]:
    """Joins boxes with nothing but a comma, an "and" or the like between them."""
    group: list[Candidate] = []
    for box in boxes:
        gap = text[group[-1].end : box.start] if group else ""
        joined = len(gap) <= _LONGEST_GAP and not _GAP.sub("", gap)
        if group and not (joined and _element(box.text) and _element(group[-1].text)):
            yield _joined(group)
            group = []
        group.append(box)
    if group:
        yield _joined(group)


def _element(text: str) -> bool:
    """Whether a box can be one of a list: a value or a word, no sentence."""
    words = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))
    return len(words) < 3 or ("\\text" not in text and is_value(text))


def _joined(group: list[Candidate]) -> Candidate:
    parts = tuple(dict.fromkeys(box.text for box in group))
    if len(parts) == 1:
        return Candidate(group[0].start, group[-1].end, parts[0])
    return Candidate(group[0].start, group[-1].end, ", ".join(parts), parts)


def _phrases(text: str) -> Iterator[tuple[Candidate, bool]]:
    """Answers that a phrase or a heading announces, and whether it says that they are final."""
    last = len(text.rstrip())
    for match in deque(_NAME.finditer(text), MOST_PHRASES):
        before = text[max(0, match.start() - 60) : match.start()]
        line = before.rpartition("\n")[2]
        final = re.search(r"(?i)\bfinal\s*$", line) is not None
        link = _LINK.match(text, match.end())
        heading = _ALONE.match(text, match.end()) and _HEADING.fullmatch(line)
        if heading or (link and link.end() < last and text[link.end()] == "\n"):
            place = link.end() if link else match.end()
            found = _next_block(text, place, last)
        elif link and not _UNSURE.search(line):
            found = _inline(text, link.end())
            plural = match[0].lower() == "answers"
            found = None if found and plural and not is_value(found[0]) else found
        else:
            continue
        if found:
            yield _worded(match.start(), *found), final
    yield from ((found, False) for found in _lines_a(text))


def _worded(start: int, payload: str, end: int) -> Candidate:
    """A payload as a candidate: "5!" in prose is a factorial, or 5; "- 5" may be an item."""
    cried = re.fullmatch(r"(.*\d)!+", payload)
    other = cried[1] if cried else payload[1:].strip() if payload.startswith("- ") else ""
    return Candidate(start, end, payload, (payload, other) if other else ())


def _inline(text: str, place: int) -> tuple[str, int] | None:
    """The answer that begins at a place: a display, or the rest of the sentence."""
    display = _display(text, place)
    if display and not display[0].startswith("$"):
        return display
    line = text[place : place + LONGEST_ANSWER].split("\n", 1)[0]
    end = place + len(line)
    payload = _sentence(line)
    payload = _SUBJECT.sub("", _FILLER.sub("", payload, count=1))
    computed = _COMPUTED.fullmatch(payload)
    payload = computed[1].strip() if computed else payload
    return (payload, end) if payload else None


def _sentence(line: str) -> str:
    """A line up to the end of its first sentence outside of formulas, without bold marks."""
    for match in _SENTENCE_END.finditer(line):
        head = line[: match.start()]
        if head.count("$") % 2 == 0 and head.count("\\(") <= head.count("\\)"):
            line = head
            break
    return _BOLD.sub("", line.strip()).strip(" \t_`*")


def _next_block(text: str, place: int, last: int) -> tuple[str, int] | None:
    """The answer on the next line that is not empty, or in the display there.

    A line that looks like no value counts only if the text ends with it.
    """
    start = place
    while start < len(text) and text[start] in " \t\r\n*_`":
        start += 1
    found = _display(text, start) or _inline(text, start)
    if found is None:
        return None
    bulleted = re.match(r"(?:[\u2022>*]|\d+[.)])\s+(?=\S)", found[0])
    payload = found[0][bulleted.end() :] if bulleted else found[0]
    return (payload, found[1]) if is_value(payload) or found[1] >= last else None


def _display(text: str, place: int) -> tuple[str, int] | None:
    """The display formula that begins at a place, and where it ends."""
    environment = _ENVIRONMENT.match(text, place)
    opening = next((mark for mark in ("\\[", "$$") if text.startswith(mark, place)), None)
    if environment:
        closing, start = f"\\end{{{environment[1]}{environment[2]}}}", environment.end()
    elif opening:
        closing, start = _DISPLAYS[opening], place + len(opening)
    else:
        return None
    end = text.find(closing, start, start + LONGEST_ANSWER)
    payload = text[start:end].strip().rstrip(".,;") if end >= 0 else ""
    return (payload, end + len(closing)) if payload else None


def _lines_a(text: str) -> Iterator[Candidate]:
    """Lines "A: x". One that opens the reasoning, or a list of choices, gives no answer."""
    if _LINE_B.search(text):
        return
    last = len(text.rstrip())
    for match in deque(_LINE_A.finditer(text), MOST_PHRASES):
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        line = text[match.end() : min(end, match.end() + LONGEST_ANSWER)]
        if end < last and parse_quantity(line) is None:
            continue  # what follows is the reasoning: the prefix opens it
        if _NAME.search(line) or "\\boxed" in line or "####" in line:
            continue
        payload = _SUBJECT.sub("", _sentence(line))
        if payload:
            yield Candidate(match.start(), end, payload)
