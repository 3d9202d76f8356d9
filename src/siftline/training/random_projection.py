"""A random projection that is never held: signs are hashes of their place.

Entry (j, k) of the projection is +1 or -1 over sqrt(d), a function of the seed and of its place
alone: bit k mod 64 of the splitmix64 word (Steele et al. 2014) number j * words + k // 64. So it is
the same on every machine and device, needs no random state, and is made block by block where it is
multiplied. With signs, inner products of n vectors are kept within a factor of 1 +- eps by
d = O(log n / eps^2) dimensions (Achlioptas 2003, Johnson-Lindenstrauss for +-1); for one pair of
unit vectors the error has a standard deviation of at most sqrt(2 / d).
"""

import torch

from siftline.kernels.draws import hash64

# The splitmix64 increment and multipliers, written as the signed integers torch has.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""Bytes of the signs of one block in float32, by kind of device."""
WORD = 64


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (products wrap; the masks make the shifts logical)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


def signs(
    start: int, stop: int, dimensions: int, seed: int, device: torch.device | None = None
) -> torch.Tensor:
    """Lines start to stop of the projection, times sqrt(d): float32 of +-1, (stop - start, d)."""
    words = -(-dimensions // WORD)
    base = hash64(seed, "gradient projection")
    number = torch.arange(start * words, stop * words, dtype=torch.int64, device=device)
    bits = _mix(number * GOLDEN + base).view(torch.uint8)  # little-endian bytes of every word
    # A table of the eight signs of every byte: four times as fast as shifting them out.
    byte = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    table = 1.0 - 2.0 * (byte & 1).to(torch.float32)
    out = table.index_select(0, bits.to(torch.int32)).view(stop - start, words * WORD)
    return out[:, :dimensions]


def project(vectors: torch.Tensor, dimensions: int, seed: int) -> torch.Tensor:
    """Projects rows to `dimensions` values.

    Args:
        vectors: float32, shape (n, P).
        dimensions: d.
        seed: Of the signs.

    Returns:
        float32, shape (n, d): `vectors` times signs over sqrt(d). What is held besides is a block
        of signs of `BLOCK_BYTES` and the bits it is made of.
    """
    kind = vectors.device.type
    width = -(-dimensions // WORD) * WORD
    lines = max(1, BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"]) // (4 * width))
    out = vectors.new_zeros((len(vectors), dimensions))
    for start in range(0, vectors.shape[1], lines):
        stop = min(start + lines, vectors.shape[1])
        out.addmm_(vectors[:, start:stop], signs(start, stop, dimensions, seed, vectors.device))
    return out.mul_(dimensions**-0.5)
