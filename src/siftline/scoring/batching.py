"""Plans batches from lengths before anything runs, so a resumed run makes the same batches.

Rows of like length stand together, which keeps padding small. The plan is a pure function of the
set of (length, id): whatever the input order, the same rows share a batch and get the same bytes.
"""

from collections.abc import Sequence


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
