"""Columns and keys that change what a row means although no row can hold them.

Dropping one would make another row of it: a picture's question without the picture, a turn that
was not to be learned. So a record that fills one is set apart with the reason. Everything else that
no field takes is left over: kept in the provenance, and counted by name.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

_MEDIA = re.compile(
    r"(?:rejected_)?(?:image|img|picture|photo|video|audio|pixel_value)s?"
    r"(?:_(?:path|file|url|id|byte|name|base64|b64|data|token|size)s?)?"
)
_MEDIA_PART = re.compile(r"(?:input_)?(?:image|video|audio|file)(?:_url|_path)?|media")
_TOKEN = re.compile(
    r"<\|(?:image|video|audio)(?:_pad|_[0-9]+)?\|>|<\|vision_start\|>|<start_of_image>"
    r"|<image_soft_token>|<image_placeholder>|<(image|video|audio)(?:_[0-9]+)?>"
)
_QUOTES = "`'\"\u2018\u201c"

Check = Callable[[Any], str | None]
"""The reason a value sets its record apart, or None."""


def filled(value: Any) -> bool:
    """Whether a value says anything: not null, NaN, or empty."""
    return value is not None and value == value and value not in ("", [], {}, ())


def truth(value: Any) -> bool | None:
    """A truth value however files write it; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return None


def _weight(value: Any) -> str | None:
    if not filled(value) or truth(value) is True:
        return None
    try:
        return None if float(value) == 1 else "weight"
    except (TypeError, ValueError):
        return "weight"


def _train(value: Any) -> str | None:
    return "no_loss" if truth(value) is False else None


def _refuted(value: Any) -> str | None:
    return "label" if value is False else None


def _if_filled(reason: str) -> Check:
    return lambda value: reason if filled(value) else None


def _if_structured(reason: str) -> Check:
    return lambda value: reason if filled(value) and isinstance(value, list | Mapping) else None


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("weight", "loss_weight", "sample_weight"), _weight),
    **dict.fromkeys(("train", "training"), _train),
    **dict.fromkeys(
        (
            "loss_mask",
            "loss_masks",
            "loss_scale",
            "assistant_mask",
            "assistant_masks",
            "completion_mask",
            "prompt_mask",
            "train_mask",
            "mask",
            "masks",
            "masked",
            "train_detail",
            "training_detail",
        ),
        _if_filled("loss_mask"),
    ),
    "labels": _if_structured("loss_mask"),
    **dict.fromkeys(
        ("correct", "is_correct", "accepted", "is_accepted", "preferred", "is_preferred", "chosen"),
        _refuted,
    ),
    "history": _if_structured("history"),
    "function_call": _if_structured("function_call"),
    "tool_calls": _if_filled("tool_calls"),
    "rejected_response": _if_filled("rejected_response"),
    "segments": _if_structured("loss_mask"),
}


PARTS_OF_A_QUESTION = ("context", "passage", "choices", "options")
"""Columns beside a question without which it is another one."""


@cache
def check_of(name: str) -> Check | None:
    """What a column or key of this name can set its record apart by, where no field takes it."""
    lower = name.lower()
    return _if_filled("media") if _MEDIA.fullmatch(lower) else _CHECKS.get(lower)


def is_media_part(kind: object) -> bool:
    """Whether a part of a message of this type is a picture, sound or file."""
    return isinstance(kind, str) and bool(_MEDIA_PART.fullmatch(kind))


def has_placeholder(text: str) -> bool:
    """Whether a text has a mark that a trainer puts a picture or a sound in the place of.

    HTML has tags of these names: one that is closed, quoted, or (video and audio) stands in the
    middle of a line is taken for that.
    """
    if "<" not in text:
        return False
    for mark in _TOKEN.finditer(text):
        name = mark.group(1)
        if name is None:
            return True
        if f"</{name}" in text or _is_quoted(text, mark.start(), mark.end()):
            continue
        if name == "image" or _at_an_edge(text, mark.start(), mark.end()):
            return True
    return False


def _is_quoted(text: str, start: int, end: int) -> bool:
    return text.count("`", 0, start) % 2 == 1 or (
        text[start - 1 : start] in _QUOTES and start > 0 and end < len(text)
    )


def _at_an_edge(text: str, start: int, end: int) -> bool:
    before, after = text[:start].rstrip(" \t"), text[end:].lstrip(" \t")
    return not before or not after or before[-1] in "\n>" or after[0] in "\n<"
