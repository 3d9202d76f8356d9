"""Fenced code blocks in a response, as CommonMark reads them, in one pass over its lines.

Also inside lists and quotations. One leniency: a fence that names a language opens a block however
far it is indented, for models indent by four spaces where CommonMark wants three.
"""

import re
from dataclasses import dataclass, field

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
