r"""A response without its reasoning: what is left is what the writer gives as the answer.

Models mark reasoning in many ways. These are read, in every case, with attributes
(`<think effort="low">`), spaces (`< / think >`), pipes (`<|think|>`) and HTML escapes
(`&lt;think&gt;`):

| form | known from |
|---|---|
| `<think>`, `<thinking>`, `<thought>`, `<reasoning>`, `<reflection>`, … | R1, Exaone, Reflection |
| `[THINK]…[/THINK]`, `◁think▷…◁/think▷`, `<seed:think>` | Magistral, Kimi, Seed-OSS |
| `<\|begin_of_thought\|>…<\|end_of_thought\|>`, `<\|START_THINKING\|>` | OpenThoughts, Command A |
| `<\|begin_of_solution\|>`, `<\|START_RESPONSE\|>`: the answer begins | the same |
| `<\|channel\|>analysis…<\|channel\|>final`, or `analysis…assistantfinal` | gpt-oss |
| `<\|channel>thought…<channel\|>`, `<\|im_start\|>think…<\|im_start\|>answer` | Gemma, s1 |
| `Here is my thought process: … Here is my response: …` | Granite |

Rules where it is not plain what is meant:

- A block that is not closed has not ended: the rest is reasoning, and there may be no answer.
- A closing mark alone ends reasoning that the chat template opened (as R1's): all before it goes.
- Blocks may stand in one another. An opening mark that is written twice in a row is one.
- A closing mark of another name closes a block if its own name is not open (`<thinking>…</think>`).
- A mark between quotes or in inline code is a mention (`` `<think>` ``). So is one in a closed
  fenced block, but for a closing mark whose block was opened outside: reasoning often leaves
  fences open.

Fenced code blocks in a response, as CommonMark reads them, in one pass over its lines.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

_QUOTED = re.compile(r" {0,3}(?:> ?)+")
_ITEM = re.compile(r"[ ]*(?:[-*+]|\d{1,9}[.)])[ ]+")
_FENCE = re.compile(r"(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: First word behind the opening fence, in lower case; empty if there is none.
        text: The lines inside, without the indentation or quotation marks of the opening fence.
        closed: False for a last block that nothing closes.
        start: Where the opening fence's line begins in the response.
        end: Behind the closing fence's line, or the response's end.
    """

    language: str
    text: str
    closed: bool = True
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)


@dataclass(frozen=True)
class _Fence:
    """An opening fence: its ticks, language, indentation, place, and whether it is quoted."""

    ticks: str
    language: str
    indent: int
    start: int
    quoted: bool


def blocks(response: str) -> list[Block]:
    """Finds the fenced blocks of a response, in order."""
    found: list[Block] = []
    opening: _Fence | None = None
    inside: list[str] = []
    items: list[int] = []
    place = 0
    for line in response.splitlines(keepends=True):
        start, place = place, place + len(line)
        quoted = _QUOTED.match(line)
        if opening is None:
            opening, inside = _opened(line[quoted.end() if quoted else 0 :], items, start), []
            if opening and quoted:
                opening = _Fence(opening.ticks, opening.language, opening.indent, start, True)
            continue
        bare = line[quoted.end() :] if quoted and opening.quoted else line
        if _closes(bare, opening):
            found.append(Block(opening.language, "".join(inside), True, opening.start, place))
            opening = None
        else:
            inside.append(_outdented(bare, opening.indent))
    if opening is not None:
        found.append(Block(opening.language, "".join(inside), False, opening.start, place))
    return found


def _opened(line: str, items: list[int], start: int) -> _Fence | None:
    """The fence that a line opens; `items` are the columns of the list items it may stand in."""
    line = line.rstrip().expandtabs(4)
    if not line:
        return None
    indent = len(line) - len(line.lstrip(" "))
    while items and items[-1] > indent:
        items.pop()
    while item := _ITEM.match(line, indent):
        indent = item.end()
        items.append(indent)
    fence = _FENCE.fullmatch(line, indent)
    if fence is None or (fence["ticks"][0] == "`" and "`" in fence["info"]):
        return None
    words = fence["info"].strip("{}").split()
    if indent - (items[-1] if items else 0) > 3 and not words:
        return None  # to CommonMark a block of indented code
    return _Fence(
        fence["ticks"], words[0].lower().lstrip(".") if words else "", indent, start, False
    )


def _closes(line: str, opening: _Fence) -> bool:
    bare = line.strip()
    if not bare.startswith(opening.ticks) or bare.strip(opening.ticks[0]):
        return False
    line = line.expandtabs(4)
    return len(line) - len(line.lstrip(" ")) <= opening.indent + 3


def _outdented(line: str, indent: int) -> str:
    """A line without as much of its indentation as the opening fence has."""
    if not indent or not line.strip():
        return line.lstrip(" \t") if indent else line
    if "\t" in line[:indent]:
        head = len(line) - len(line.lstrip(" \t"))
        line = line[:head].expandtabs(4) + line[head:]
    spaces = len(line) - len(line.lstrip(" "))
    return line[min(spaces, indent) :]


_NAME = (
    r"(?:seed:|antml:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|scratch_?pad"
    r"|(?:thinking|thought|reasoning)[_-]process|inner[_-]thoughts?|(?:inner|internal)[_-]monologue"
    r"|chain[_-]of[_-]thoughts?|cot)"
)
_MARK = re.compile(
    rf"(?:<|&lt;|\uff1c)\|?\s{{0,3}}(?P<close>/?)\s{{0,3}}(?P<name>{_NAME})"
    r"(?:\s[^<>\n]{0,200}?)?\s{0,3}(?P<empty>/?)\|?(?:>|&gt;|\uff1e)"
    r"|\[(?P<close2>/?)(?P<name2>think(?:ing)?)\]|◁(?P<close3>/?)(?P<name3>think(?:ing)?)▷"
    r"|<\|(?:begin|start|(?P<close4>end))_(?:of_)?(?P<name4>think(?:ing)?|thought|reasoning)\|>"
    r"|<\|channel>\s{0,3}(?P<name5>thought)|(?P<close6><)(?P<name6>channel)\|>"
    r"|<\|(?P<answer>begin|start|end)_(?:of_)?(?:solution|response|answer)\|>",
    re.IGNORECASE,
)
_CHANNEL = re.compile(
    r"<\|channel\|>\s{0,3}(?P<name>analysis|commentary|final)(?:[^\n]{0,200}?<\|message\|>)?"
    r"|<\|im_start\|>\s{0,3}(?P<name2>think|answer)\b"
    r"|<\|(?:end|return|call|start|im_end|im_start)\|>",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"\s*Here(?:'s| is) my thought process:", re.IGNORECASE)
_RESPONSE = re.compile(r"Here(?:'s| is) my response:", re.IGNORECASE)
_INLINE = re.compile(r"`[^`\n]+`")
_QUOTES = frozenset("`'\"\u201c\u201d\u2018\u2019\u00ab\u00bb\u201e")


@dataclass(frozen=True)
class _Mark:
    """A mark of reasoning.

    Attributes:
        way: `open`, `close`, `answer` (behind it the answer begins) or `empty`.
        name: Of the block; the same whatever its case and pipes.
        start: Its place in the text.
        end: Behind it.
        fence: The closed fenced block that it stands in; None outside.
    """

    way: str
    name: str
    start: int
    end: int
    fence: int | None = None


def without_reasoning(response: str) -> str:
    """The response without its reasoning blocks; empty where it never left them.

    A response without a mark of reasoning is returned as it is. Linear in the response's length.
    """
    response = _final_channels(response)
    thoughts = _THOUGHTS.match(response)
    if thoughts:
        said = _RESPONSE.search(response, thoughts.end())
        response = response[said.end() :] if said else ""
    marks = _spoken([_mark(match) for match in _MARK.finditer(response)], response)
    spans = _reasoning(_without_examples(marks), response)
    return _left(response, spans) if spans else response


def _final_channels(response: str) -> str:
    """The channels that are for the reader, where a response has channels; see gpt-oss and s1."""
    found = [(match, _Mark("", "", *match.span())) for match in _CHANNEL.finditer(response)]
    spoken = {m.start for m in _spoken([m for _, m in found], response) if m.fence is None}
    if not any(m[1] or m[2] for m, _ in found if m.start() in spoken):
        return _without_stripped_channels(response)
    kept, open_, place = [], False, 0
    for match, _ in found:
        if open_:
            kept.append(response[place : match.start()])
        open_ = (match["name"] or match["name2"] or "").lower() in ("final", "answer")
        place = match.end()
    return "\n".join([*kept, *([response[place:]] if open_ else [])])


def _without_stripped_channels(response: str) -> str:
    """The final channel where the special tokens are left out: analysisWe… assistantfinal5."""
    if not response.lstrip().startswith("analysis"):
        return response
    _, final, said = response.rpartition("assistantfinal")
    if final:
        return said
    return "" if response.lstrip()[len("analysis") :][:1].isupper() else response


def _mark(match: re.Match[str]) -> _Mark:
    if match["answer"]:
        way = "empty" if match["answer"].lower() == "end" else "answer"
        return _Mark(way, "", *match.span())
    names = [match["name"], *(match[f"name{i}"] for i in range(2, 7))]
    closes = [match["close"], *(match[f"close{i}"] for i in (2, 3, 4, 6))]
    way = "empty" if match["empty"] else "close" if any(closes) else "open"
    name = next(filter(None, names)).lower().replace("-", "_")
    return _Mark(way, "thought" if match["name6"] else name, *match.span())


class _Spans:
    """Spans in order; `at` is the number of the one that holds a place, or None. O(log n)."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.spans = list(spans)
        self.starts = [start for start, _ in self.spans]

    def at(self, place: int) -> int | None:
        """The number of the span that holds a place."""
        number = bisect_right(self.starts, place) - 1
        return number if number >= 0 and place < self.spans[number][1] else None


def _spoken(marks: list[_Mark], text: str) -> list[_Mark]:
    """Marks that are neither quoted nor in inline code; each knows its fenced block."""
    if not marks:
        return []
    inline = _Spans(match.span() for match in _INLINE.finditer(text))
    fenced = _Spans((block.start, block.end) for block in blocks(text) if block.closed)
    kept = []
    for mark in marks:
        fence = fenced.at(mark.start)
        quotes = text[mark.start - 1 : mark.start], text[mark.end : mark.end + 1]
        if all(quote in _QUOTES for quote in quotes):
            continue
        if fence is not None or inline.at(mark.start) is None:
            kept.append(replace(mark, fence=fence))
    return kept


def _without_examples(marks: list[_Mark]) -> list[_Mark]:
    """Drops marks in fenced blocks but for closing ones that close nothing in their block."""
    kept: list[_Mark] = []
    within, depth = None, 0
    for mark in marks:
        if mark.fence is None:
            kept.append(mark)
            continue
        if mark.fence != within:
            within, depth = mark.fence, 0
        if mark.way == "close" and not depth:
            kept.append(mark)
        depth = max(0, depth + {"open": 1, "close": -1}.get(mark.way, 0))
    return kept


def _reasoning(marks: list[_Mark], text: str) -> list[tuple[int, int]]:
    """Spans of the reasoning, marks included."""
    found: list[tuple[int, int]] = []
    stack: list[_Mark] = []
    names: Counter[str] = Counter()
    for mark in marks:
        if mark.way == "open":
            stack.append(mark)
            names[mark.name] += 1
        elif mark.way == "close" and stack:
            opened = stack.pop()
            while names[mark.name] and opened.name != mark.name:
                names[opened.name] -= 1
                opened = stack.pop()
            names[opened.name] -= 1
            found.append((opened.start, mark.end))
        elif mark.way == "close":
            if mark.fence is None or not found:
                found.append((0, mark.end))
        elif mark.way == "answer" and stack:
            found.append((stack[0].start, mark.end))
            stack.clear()
            names.clear()
        else:
            found.append((mark.start, mark.end))
    ends = dict(found)
    for mark in stack:
        again = re.compile(r"\s*").match(text, mark.end)
        assert again is not None
        if again.end() not in ends:  # else a template wrote one, and the model another
            return [*found, (mark.start, len(text))]
        found.append((mark.start, again.end()))
    return found


def _left(text: str, spans: list[tuple[int, int]]) -> str:
    """The text outside some spans; words that a span stood between do not grow together."""
    pieces, place = [], 0
    for start, end in sorted(spans):
        if start > place:
            pieces.append(text[place:start])
        place = max(place, end)
    pieces.append(text[place:])
    left = [piece for piece in pieces if piece]
    for i in range(1, len(left)):
        if not left[i - 1][-1].isspace() and not left[i][0].isspace():
            left[i] = "\n" + left[i]
    return "".join(left)
