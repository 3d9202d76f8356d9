"""Plans batches from lengths before anything runs, so a resumed run makes the same batches.

Rows of like length stand together, which keeps padding small. The plan is a pure function of the
set of (length, id): whatever the input order, the same rows share a batch and get the same bytes.

How much memory there is has no say in the plan. A batch that does not fit runs in halves, each time
anew: a size learned from earlier batches would make bytes depend on what ran before.

How many tokens a text has at least, told from its length alone.
"""

import json
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Item = TypeVar("Item")
Result = TypeVar("Result")

EXHAUSTED = (
    "out of memory",  # CUDA error: out of memory; CUDA out of memory. Tried to allocate ...
    "can't allocate memory",  # torch's default CPU allocator on Linux
    "not enough memory",  # the same on Windows
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and the like of cuDNN and cuSPARSE
)
"""What errors say, in lower case, that are a plain RuntimeError by type."""


def plan_batches(
    lengths: Sequence[int], ids: Sequence[str], max_tokens: int, max_rows: int
) -> list[list[int]]:
    """Cuts rows, sorted by (length, id), into batches.

    Args:
        lengths: Tokens of each of n rows.
        ids: n distinct ids; they settle the order of equal lengths.
        max_tokens: Most tokens of a batch, padding included: rows x longest. A row above it stands
            alone.
        max_rows: Most rows of a batch.

    Returns:
        Positions into `lengths`, batch by batch, shortest first. Each position once.

    Raises:
        ValueError: if a limit is below 1, or lengths and ids differ in number.
    """
    if max_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_tokens {max_tokens} and max_rows {max_rows} must be at least 1")
    if len(lengths) != len(ids):
        raise ValueError(f"{len(lengths)} lengths for {len(ids)} ids: give one of each a row")
    batches: list[list[int]] = []
    for position in sorted(range(len(ids)), key=lambda i: (lengths[i], ids[i])):
        # Ascending lengths: the newest row is the longest of its batch.
        full = batches and (
            len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * lengths[position] > max_tokens
        )
        if full or not batches:
            batches.append([])
        batches[-1].append(position)
    return batches


def in_halves(
    run: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    shrink: Callable[[int], None],
    remedy: str,
) -> list[Result]:
    """Runs a batch; where memory runs out, its first half, the larger, and its second, and so on.

    Args:
        run: Gives one result an item, whatever the other items.
        items: The batch; an empty one is not run.
        shrink: Is told how many items were too many, before their halves run.
        remedy: What helps when one item alone is too much.

    Returns:
        One result an item.

    Raises:
        RuntimeError: if memory runs out with a single item.
    """
    if not items:
        return []
    try:
        return run(items)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        if len(items) == 1:
            raise RuntimeError(f"out of memory with a single row: {remedy}") from error
    # Out of the except block, whose traceback would keep the failed batch's tensors alive.
    shrink(len(items))
    middle = (len(items) + 1) // 2
    return [
        *in_halves(run, items[:middle], shrink, remedy),
        *in_halves(run, items[middle:], shrink, remedy),
    ]


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that an allocation failed.

    Of a plain RuntimeError, which the CPU allocator and CUDA libraries raise, the text decides.
    """
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(said in text for said in EXHAUSTED):
            return True
        error = error.__cause__ or error.__context__
    return False


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
