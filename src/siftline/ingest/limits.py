"""How large one record may be, told before it is parsed or held in memory.

A gzip file of some megabytes can hold a line of gigabytes, and a line of some kilobytes lists that
are nested deeper than any parser goes. Either is one faulty record: it gets a line number and a
reason, and reading goes on behind it.
"""

import re
from collections.abc import Iterator
from typing import IO, Any

RECORD_BYTES = 32 << 20
"""Most bytes of one record: several million tokens, more than any model reads."""
DEPTH = 100
"""Most lists and objects within each other. JSON schemas of tools nest some twenty deep."""
FILE_BYTES = 1 << 30
"""Most bytes, unpacked, of a file that has to be in memory whole: one JSON array."""
TOO_LONG, TOO_DEEP, INVALID = "too_long", "too_deep", "invalid_json"
HEAD_BYTES = 4096
"""What is kept of a line that is too long, for its excerpt."""
_SKIPPED_BYTES = 1 << 20
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


def bounded_lines(
    stream: IO[bytes], most: int = RECORD_BYTES
) -> Iterator[tuple[int, bytes, str | None]]:
    """Lines of a file, none of them held in memory beyond a limit.

    Args:
        stream: Binary, to be read forward.
        most: Most bytes of a line, its end included.

    Yields:
        The line's number from 1, its bytes, and why it is not to be parsed: `too_long` (the bytes
        are its beginning), what `nesting_fault` says, or None.
    """
    number = 0
    while raw := stream.readline(most + 1):
        number += 1
        if len(raw) > most:
            head, ended = raw[:HEAD_BYTES], raw.endswith(b"\n")
            while not ended:
                raw = stream.readline(_SKIPPED_BYTES)
                ended = not raw or raw.endswith(b"\n")
            yield number, head, TOO_LONG
        else:
            yield number, raw, nesting_fault(raw)


def nesting_fault(raw: bytes, most: int = DEPTH) -> str | None:
    """Why a JSON text can't be parsed for its brackets, in time linear in its length.

    `too_deep` where it nests deeper than `most`; `invalid_json` where brackets are left open too,
    since that is what it would be at any depth.
    """
    if raw.count(b"[") + raw.count(b"{") <= most:
        return None
    depth, deepest = 0, 0
    for bracket in _BRACKETS.finditer(_TEXT.sub(b"", raw)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(depth, deepest)
    if deepest <= most:
        return None
    return INVALID if depth else TOO_DEEP


def record_fault(value: Any, most: int = RECORD_BYTES, depth: int = DEPTH) -> str | None:
    """Why a parsed record is refused whatever format it came in: `too_long`, `too_deep` or None.

    Its size is that of its texts and numbers, in characters; eight for a number.
    """
    size, left = 0, [(value, 1)]
    while left:
        here, level = left.pop()
        if isinstance(here, dict | list | tuple):
            if level > depth:
                return TOO_DEEP
            if isinstance(here, dict):
                size += sum(len(str(name)) for name in here)
            parts = here.values() if isinstance(here, dict) else here
            left.extend((part, level + 1) for part in parts)
            size += len(here)
        else:
            size += len(here) if isinstance(here, str | bytes) else 8
        if size > most:
            return TOO_LONG
    return None
