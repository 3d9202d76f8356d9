"""Splitting a whole number by weights, exactly and within capacities.

Selectors hand out a budget to clusters with it. `int(budget / k)` per cluster, as released kMQ code
does, loses the remainders and whatever small clusters cannot use; here every unit is handed out.
"""

import numpy as np


def largest_remainder(
    weights: np.ndarray, total: int, capacity: np.ndarray | None = None
) -> np.ndarray:
    """Splits `total` by weight with the largest remainder method (Hamilton), within capacities.

    An entry whose proportional share reaches its capacity gets its capacity, and what it could not
    use is split among the others by the same rule. Entries of weight 0 are served last, equally,
    and only when the others are full. Equal remainders go to the lower index.

    Args:
        weights: Non-negative weights, shape (n,).
        total: Units to hand out, not negative.
        capacity: Most units each entry can take, integers of shape (n,); None means no limit.

    Returns:
        int64 quotas, shape (n,), summing to min(total, sum(capacity)); zeros for n = 0.

    Raises:
        ValueError: if a weight, the total or a capacity is negative or not finite.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError("weights must be finite and not negative")
    if total < 0:
        raise ValueError(f"cannot split {total} units: give a total of 0 or more")
    room = _capacities(capacity, len(weights), total)
    left = min(int(total), int(room.sum()))
    quotas = np.zeros(len(weights), dtype=np.int64)
    # Weight 0 forms a second class with equal weights, so a total that fits is always handed out.
    for members, shares in ((weights > 0, weights), (weights == 0, np.ones_like(weights))):
        positions = np.flatnonzero(members & (room > 0))
        given = _fill(shares[positions], min(left, int(room[positions].sum())), room[positions])
        quotas[positions] = given
        left -= int(given.sum())
    assert left == 0, f"{left} units left over"
    return quotas


def _capacities(capacity: np.ndarray | None, n: int, total: int) -> np.ndarray:
    """Checked capacities, none above the total so that their sum cannot overflow."""
    if capacity is None:
        return np.full(n, total, dtype=np.int64)
    room = np.asarray(capacity)
    if room.shape != (n,):
        raise ValueError(f"capacity has shape {room.shape}: give one per weight ({n})")
    if n and (not np.issubdtype(room.dtype, np.integer) or np.any(room < 0)):
        raise ValueError("capacities must be integers and not negative")
    return np.minimum(room.astype(np.int64), total)


def _fill(weights: np.ndarray, total: int, room: np.ndarray) -> np.ndarray:
    """Splits by positive weights: caps the saturated and splits the rest until none saturates."""
    quotas = np.zeros(len(weights), dtype=np.int64)
    active = np.arange(len(weights))
    while total > 0:
        assert len(active), f"{total} units and nobody to take them"
        # Scaled by the largest first, so that weights near the limits of a double neither
        # overflow nor vanish in their sum.
        scaled = weights[active] / weights[active].max()
        share = total * (scaled / scaled.sum())
        full = share >= room[active]
        if not full.any():
            return quotas + _round(share, total, active, len(weights))
        quotas[active[full]] = room[active[full]]
        total -= int(room[active[full]].sum())
        active = active[~full]
    return quotas


def _round(share: np.ndarray, total: int, active: np.ndarray, n: int) -> np.ndarray:
    """Rounds shares below their capacities down, then up by one in order of remainder."""
    floor = np.floor(share)
    # Equal remainders must tie whatever float noise says, so they are compared to 9 decimals.
    remainder = np.round(share - floor, 9)
    missing = int(total - floor.sum())
    assert 0 <= missing <= len(share), (missing, len(share))
    quotas = np.zeros(n, dtype=np.int64)
    quotas[active] = floor.astype(np.int64)
    quotas[active[np.argsort(-remainder, kind="stable")[:missing]]] += 1
    return quotas
