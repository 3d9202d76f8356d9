"""Gumbel noise from a hash, and the choice of a token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.base import Sampling
from siftline.scoring.engines.decode import choose, gumbel_noise


def mix64(x):
    """splitmix64's finaliser, in plain integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000), st.integers(1, 12))
def test_noise_is_the_hash_written_plainly(seed, step, vocab):
    golden = 0x9E3779B97F4A7C15
    row = mix64((mix64(seed % 2**64) + (step + 1) * golden) % 2**64)
    bits = [mix64((row + (v + 1) * golden) % 2**64) >> 11 for v in range(vocab)]
    expected = [-math.log(-math.log((b + 0.5) / 2**53)) for b in bits]
    noise = gumbel_noise(torch.tensor([seed, 7]), step, vocab)
    np.testing.assert_allclose(noise[0], expected, rtol=1e-12, atol=1e-12)


def test_noise_is_uncorrelated_over_seeds_steps_and_tokens():
    noise = torch.stack([gumbel_noise(torch.arange(64), step, 64) for step in range(16)])
    flat = noise.flatten().numpy()
    assert flat.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert flat.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    centred = noise - noise.mean()
    for axis in range(3):  # neighbours along step, seed, token
        shifted = (centred * centred.roll(1, dims=axis)).mean() / centred.var()
        assert abs(float(shifted)) < 4 / math.sqrt(noise.numel())


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).repeat(400, 1)
    seeds = torch.arange(400)
    for top_p, kept in [(0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (0.8, {1, 2, 3})]:
        assert set(choose(logits, seeds, 0, Sampling(top_p=top_p)).tolist()) == kept
