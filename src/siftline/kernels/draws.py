"""Random draws that depend on what is drawn for, never on when.

Every draw is u = hash(seed, stage, id, index). So a draw for one row does not move when another row
arrives, and input order, workers and machines change nothing. Weighted sampling without replacement
is Gumbel top-k (Efraimidis & Spirakis 2006; Vieira 2014): keep the k largest log w - log(-log u).
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def hash64(*parts: object) -> int:
    """63-bit unsigned hash of the parts' text, for seeds that other libraries take."""
    payload = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


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
