"""Plans batches from lengths before anything runs, so a resumed run makes the same batches.

Rows of like length stand together, which keeps padding small. The plan is a pure function of the
set of (length, id): whatever the input order, the same rows share a batch and get the same bytes.

How much memory there is has no say in the plan. A batch that does not fit runs in halves, each time
anew: a size learned from earlier batches would make bytes depend on what ran before.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

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
