"""Fenced code blocks in a response, as CommonMark reads them, in one pass over its lines."""

import re
from dataclasses import dataclass

_FENCE = re.compile(r" {0,3}(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: First word behind the opening fence, in lower case; empty if there is none.
        text: The lines inside.
        closed: False for a last block that nothing closes.
    """

    language: str
    text: str
    closed: bool = True


def blocks(response: str) -> list[Block]:
    """Finds the fenced blocks of a response, in order."""
    found: list[Block] = []
    opening, language = "", ""
    inside: list[str] = []
    for line in response.splitlines(keepends=True):
        fence = _FENCE.fullmatch(line.rstrip())
        if not opening:
            if fence:
                opening, inside = fence["ticks"], []
                language = (fence["info"].split() or [""])[0].lower()
        elif fence and not fence["info"] and fence["ticks"].startswith(opening):
            found.append(Block(language, "".join(inside)))
            opening = ""
        else:
            inside.append(line)
    if opening:
        found.append(Block(language, "".join(inside), closed=False))
    return found
