"""How many tokens a text has at least, told from its length alone.

Tokenising a text of some megabytes takes seconds, or minutes where nothing cuts it into words. A
row that is far too long must not cost that. If no token stands for more than L characters, and no
character goes without a token, n characters are at least n / L tokens: that much can be said
without looking at them. Where a tokenizer allows no such proof nothing is said, and the text is
tokenised.
"""

import json
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

COMPOSED = 4
"""Most characters that one composed character stands for (Unicode's canonical composition)."""
BYTES = 256
_KEPT = {"NFD": 1, "NFKD": 1, "NFC": COMPOSED, "NFKC": COMPOSED, "Lowercase": 1, "Prepend": 1}
"""Normalizers that leave nothing out, and the characters that become one by them."""
_WHOLE = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
"""Ways to cut a text into words that leave nothing out."""
_BOUNDS: MutableMapping[Any, tuple[int, int | None]] = WeakKeyDictionary()
"""By tokenizer: its size when it was looked at, for it may be given more, and its bound."""


def least_tokens(tokenizer: Any, text: str) -> int:
    """A number of tokens that `text` can't have less of; 0 where nothing is known."""
    longest = longest_token(tokenizer)
    return 0 if longest is None else -(-len(text) // longest)


def longest_token(tokenizer: Any) -> int | None:
    """Most characters of a text that one token stands for; None where no bound can be proved."""
    try:
        size, bound = _BOUNDS.get(tokenizer, (-1, None))
        if size != len(tokenizer):
            bound = _bound(tokenizer)
            _BOUNDS[tokenizer] = len(tokenizer), bound
    except TypeError:  # it has no length, or can't be remembered: none of transformers' own
        return None
    return bound


def _bound(tokenizer: Any) -> int | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(
        t.lstrip or t.rstrip for t in tokenizer.added_tokens_decoder.values()
    ):
        return None  # such a token takes in all the space around it
    shrink, whole = _shrink(_state(backend.normalizer)), _is_whole(_state(backend.pre_tokenizer))
    vocabulary = tokenizer.get_vocab()
    if shrink is None or not whole or not vocabulary or not _covers(backend, vocabulary):
        return None
    return shrink * max(map(len, vocabulary))


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as its file has it; an unknown kind where it has no such form."""
    if part is None:
        return None
    try:
        state = json.loads(part.__getstate__())
    except Exception:  # written in Python: the library raises a bare Exception
        return {"type": "own"}
    return state if isinstance(state, dict) else {"type": "own"}


def _shrink(state: dict[str, Any] | None) -> int | None:
    """Most characters that a normalizer makes one of; None where it may drop some."""
    if state is None:
        return 1
    if state["type"] == "Sequence":
        product = 1
        for part in state["normalizers"]:
            factor = _shrink(part)
            if factor is None:
                return None
            product *= factor
        return product
    if state["type"] == "Replace":
        old = state["pattern"].get("String")
        return 1 if old and len(old) <= len(state["content"]) else None
    return _KEPT.get(state["type"])


def _is_whole(state: dict[str, Any] | None) -> bool:
    """Whether cutting a text into words leaves nothing of it out."""
    if state is None or state["type"] in _WHOLE:
        return True
    if state["type"] == "Sequence":
        return all(map(_is_whole, state["pretokenizers"]))
    return state["type"] in ("Split", "Punctuation") and state["behavior"] != "Removed"


def _covers(backend: Any, vocabulary: dict[str, int]) -> bool:
    """Whether every character that no token knows costs a token of its own, or several."""
    model = backend.model
    kind = type(model).__name__
    if kind in ("BPE", "Unigram") and getattr(model, "byte_fallback", False):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(BYTES))
    if kind != "BPE":
        return False  # one token may stand for any unknown word
    if _has_bytes(_state(backend.pre_tokenizer)) or _has_bytes(_state(backend.normalizer)):
        from tokenizers.pre_tokenizers import ByteLevel

        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    return model.unk_token is not None and not model.fuse_unk


def _has_bytes(state: dict[str, Any] | None) -> bool:
    if state is None:
        return False
    parts = state.get("pretokenizers", state.get("normalizers", ()))
    return state["type"] == "ByteLevel" or any(map(_has_bytes, parts))
