"""One JSON record from bytes, by one rule for every verb and format.

NaN and the infinities are read, as Python writes them. Of repeated keys the last counts, as in
Python, and they are counted. Whole numbers keep every digit. Half a surrogate pair is no character:
no file could hold it, so its record is refused.

How large one record may be, told before it is parsed or held in memory.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

import orjson

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


_HUGE = 9.2e18
"""From here on a float may have been a whole number of more than 64 bits."""
_ODD = -(1 << 62)


class Unparsable(ValueError):
    """Bytes that are no record; `reason` is what quarantine says."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_record(raw: bytes) -> tuple[Any, int]:
    """Reads one JSON value.

    Args:
        raw: UTF-8 without a byte order mark.

    Returns:
        The value, and how many keys stand in an object that had them already.

    Raises:
        Unparsable: `invalid_utf8` or `invalid_json`.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_slowly(raw)
    if _keys_written(raw) != _keys(value):
        return _parse_slowly(raw)
    return value, 0


def parse_text(text: str) -> tuple[Any, int]:
    """Reads one JSON value; half surrogates are let through, for `whole_text` to find.

    Raises:
        Unparsable: `invalid_json`.
    """
    repeated = 0

    def last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        made = dict(pairs)
        repeated += len(pairs) - len(made)
        return made

    try:
        return json.loads(text, object_pairs_hook=last), repeated
    except (ValueError, RecursionError) as error:
        raise Unparsable("invalid_json") from error


def whole_text(value: Any) -> bool:
    """Whether all strings of a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_slowly(raw: bytes) -> tuple[Any, int]:
    """By the standard library, which reads what orjson refuses or would change."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unparsable("invalid_utf8") from error
    value, repeated = parse_text(text)
    if not whole_text(value):
        raise Unparsable("invalid_utf8")
    return value, repeated


_SPACES = (b" :", b"\t:", b"\r:", b"\n:")
_SPACED = re.compile(rb'"\s+:')


def _keys_written(raw: bytes) -> int:
    r"""Keys as far as bytes tell, never fewer than there are; -1 where they don't tell.

    A key is a quote and a colon, and `\":` stands inside a string. A string that begins with a
    colon counts as one too many: then the record is read again, with care. So it is where space
    stands before a key's colon, or a backslash ends a key.
    """
    if b'\\\\":' in raw or (any(mark in raw for mark in _SPACES) and _SPACED.search(raw)):
        return -1
    return raw.count(b'":') - raw.count(b'\\":')


def _keys(value: Any) -> int:
    """Keys of all objects within a value; a number that nothing equals where a float is huge."""
    items: Iterable[Any]
    if type(value) is dict:
        count, items = len(value), value.values()
    elif type(value) is list:
        count, items = 0, value
    else:
        return 0 if type(value) is not float or abs(value) < _HUGE else _ODD
    for item in items:
        kind = type(item)
        if kind is dict or kind is list:
            count += _keys(item)
        elif kind is float and not -_HUGE < item < _HUGE:
            return _ODD
    return count
