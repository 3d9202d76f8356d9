"""One JSON record from bytes, by one rule for every verb and format.

NaN and the infinities are read, as Python writes them. Of repeated keys the last counts, as in
Python, and they are counted. Whole numbers keep every digit. Half a surrogate pair is no character:
no file could hold it, so its record is refused.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import orjson

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
