"""Random draws that depend on what is drawn for, never on when.

Every draw is u = hash(seed, stage, id, index). So a draw for one row does not move when another row
arrives, and input order, workers and machines change nothing. Weighted sampling without replacement
is Gumbel top-k (Efraimidis & Spirakis 2006; Vieira 2014): keep the k largest log w - log(-log u).

Splitting a whole number by weights, exactly and within capacities.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def hash64(*parts: object) -> int:
    """63-bit unsigned hash of the parts' text, for seeds that other libraries take."""
    payload = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


def hash64_each(texts: Iterable[str]) -> np.ndarray:
    """`hash64` of each text, uint64, shape (n,)."""
    raw = b"".join([hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(raw, "<u8").astype(np.uint64) >> np.uint64(1)


def uniforms(seed: int, stage: str, ids: Sequence[str], index: int = 0) -> np.ndarray:
    """One uniform draw in the open interval (0, 1) per id.

    Args:
        seed: The recipe's seed.
        stage: Name of the drawing stage; two stages draw independently.
        ids: n ids.
        index: Which draw for that id.

    Returns:
        float64 array, shape (n,).
    """
    prefix = f"{seed}\x1f{stage}\x1f{index}\x1f".encode()
    raw = b"".join(hashlib.blake2b(prefix + i.encode(), digest_size=8).digest() for i in ids)
    # The half step keeps 0 and 1 out, where log() is infinite; with 53 bits it would round to 1.
    return ((np.frombuffer(raw, dtype="<u8") >> 12).astype(np.float64) + 0.5) / 2.0**52


def quick_uniforms(seed: int, stage: str, ids: Sequence[str]) -> np.ndarray:
    """One uniform draw in the open interval (0, 1) per id, at half the cost of `uniforms`.

    The bytes of an id pass a multiplying hash (the MurmurHash3 finaliser, a word at a time) in
    place of a cryptographic one: good enough for ids that are hashes themselves, as row ids are.

    Args:
        seed: The recipe's seed.
        stage: Name of the drawing stage; two stages draw independently.
        ids: n ASCII ids.

    Returns:
        float64 array, shape (n,).
    """
    if not len(ids):
        return np.empty(0, np.float64)
    text = np.array(ids, dtype=np.bytes_)
    width = -(-text.dtype.itemsize // 8) * 8
    words = text.astype(f"S{width}").view("<u8").reshape(len(ids), -1)
    h = np.full(len(ids), hash64(seed, stage), np.uint64)
    sizes = np.char.str_len(text)
    for k, word in enumerate(words.T):  # of its own words alone: others in the call don't matter
        h = np.where(sizes > 8 * k, _mixed(h ^ word), h)
    return ((h >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def quick_uniform_reference(seed: int, stage: str, identity: str) -> float:
    """What `quick_uniforms` draws for one id, in plain Python."""
    raw, h = identity.encode("ascii"), hash64(seed, stage)
    for start in range(0, len(raw), 8):
        h ^= int.from_bytes(raw[start : start + 8], "little")
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = (h ^ (h >> 33)) * factor & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 33
    return ((h >> 12) + 0.5) / 2.0**52


def _mixed(h: np.ndarray) -> np.ndarray:
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        h = (h ^ (h >> np.uint64(33))) * factor
    mixed: np.ndarray = h ^ (h >> np.uint64(33))
    return mixed


def gumbel_top_k(
    u: np.ndarray, ids: Sequence[str], k: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Draws k of n without replacement, with probability proportional to weight at each pick.

    Args:
        u: Uniform draws, shape (n,).
        ids: n ids; they settle ties.
        k: How many to draw, at most n.
        weights: Non-negative weights, shape (n,); None means equal. Weight 0 is drawn last.

    Returns:
        int64 positions of the drawn, best first, shape (k,).

    Raises:
        ValueError: if k exceeds n or a weight is negative or not finite.
    """
    if k > len(ids):
        raise ValueError(f"cannot draw {k} of {len(ids)} without replacement: lower the quota")
    gumbel = -np.log(-np.log(u))
    if weights is not None:
        if not np.all(np.isfinite(weights)) or np.any(weights < 0):
            raise ValueError("weights must be finite and not negative")
        with np.errstate(divide="ignore"):
            gumbel = gumbel + np.log(weights)
    return np.lexsort((np.asarray(ids), -gumbel))[:k]


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
