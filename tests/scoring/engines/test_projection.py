"""The tiled projection against the definitions, and what it allocates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siftline.scoring.projection import TILES, Head, head_of, scored, scored_in_full


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def planted(n, vocabulary, width=8, k=1, seed=0, spread=3.0, **head):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator)
    hidden = torch.randn(n, width, generator=generator) * spread / width**0.5
    targets = torch.randint(0, vocabulary, (n, k), generator=generator)
    return Head(weight, **head), hidden, targets


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 30),
    st.integers(1, 40),
    st.integers(1, 3),
    st.tuples(st.integers(1, 12), st.integers(1, 50)),
    st.sampled_from([1.0, 0.25, 60.0]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
)
def test_any_tile_gives_the_numbers_of_the_definition(n, vocabulary, k, tile, spread, cap, biased):
    bias = torch.linspace(-2, 2, vocabulary) if biased else None
    head, hidden, targets = planted(
        n, vocabulary, k=k, spread=spread, bias=bias, scale=0.5, softcap=cap
    )
    expected = scored_in_full(head, hidden, targets)
    found = scored(head, hidden, targets, details=True, tile=tile)
    assert found.shape == (n, k + 2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[:, : k + 1], expected[:, : k + 1], atol=2e-5, rtol=2e-6)
    plain = scored(head, hidden, targets, tile=tile)
    np.testing.assert_allclose(plain, expected[:, :k], atol=2e-5, rtol=2e-6)


def test_a_distribution_by_hand():
    # Logits 0, log 2, log 5 have probabilities 1/8, 1/4, 5/8.
    head = Head(torch.tensor([[0.0], [np.log(2)], [np.log(5)]], dtype=torch.float32))
    hidden, targets = torch.ones(3, 1), torch.tensor([[0], [1], [2]])
    entropy = -(np.log(1 / 8) / 8 + np.log(1 / 4) / 4 + 5 * np.log(5 / 8) / 8)
    for entries in (1, 2, 3):
        found = scored(head, hidden, targets, details=True, tile=(2, entries)).numpy()
        np.testing.assert_allclose(found[:, 0], np.log([1 / 8, 1 / 4, 5 / 8]), atol=1e-6)
        np.testing.assert_allclose(found[:, 1], entropy, atol=1e-6)
        assert found[:, 2].tolist() == [0, 0, 1]


def test_a_token_as_likely_as_the_best_counts_as_a_hit_in_any_tile():
    head = Head(torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    targets = torch.tensor([[0], [1], [2], [3]])
    for entries in (1, 2, 3, 4):
        found = scored(head, torch.ones(4, 1), targets, details=True, tile=(3, entries))
        assert found[:, 2].tolist() == [1, 0, 1, 1]


def test_tokens_that_a_model_rules_out_have_no_weight():
    """A bias of -inf is how some models forbid tokens; a whole tile of them must not spread NaN."""
    bias = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf])
    head = Head(torch.zeros(5, 2), bias)
    targets = torch.tensor([[0], [2], [4]])
    for entries in (1, 2, 5):
        found = scored(head, torch.zeros(3, 2), targets, details=True, tile=(3, entries)).numpy()
        np.testing.assert_allclose(found[:, 0], [-np.inf, -np.log(2), -np.inf], atol=1e-6)
        np.testing.assert_allclose(found[:, 1], np.log(2), atol=1e-6)
        assert found[:, 2].tolist() == [0, 1, 0]


def test_a_state_that_is_not_a_number_gives_none():
    head, hidden, targets = planted(4, 20)
    hidden[1] = torch.nan
    found = scored(head, hidden, targets, details=True, tile=(4, 6))
    assert torch.isnan(found[1, :2]).all()
    assert torch.isfinite(found[[0, 2, 3]]).all()


def test_half_precision_rounds_products_as_the_model_does_and_sums_in_full():
    head, hidden, targets = planted(9, 40)
    half = Head(head.weight.bfloat16(), head.weight[:, 0].bfloat16())
    logits = torch.nn.functional.linear(hidden.bfloat16(), half.weight, half.bias)
    expected = logits.float().log_softmax(dim=1).gather(1, targets)
    found = scored(half, hidden.bfloat16(), targets, tile=(4, 7))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_memory_grows_with_neither_positions_nor_vocabulary():
    rows, entries = TILES["cpu"]

    def largest(n, vocabulary):
        head, hidden, targets = planted(n, vocabulary, width=2)
        with torch.inference_mode(), Largest() as seen:
            scored(head, hidden, targets)
        return seen.elements

    # Tensors of an operation, weights and their views among them, are no larger than one tile.
    assert largest(1500, 4000) == largest(3000, 4000) == largest(1500, 9000) == rows * entries
    head, hidden, targets = planted(1500, 4000, width=2)
    with Largest() as seen:
        scored_in_full(head, hidden, targets)
    assert seen.elements == 1500 * 4000  # the probe sees what it should


def test_only_a_plain_linear_layer_is_a_head():
    class Config:
        logits_scaling = 4.0
        final_logit_softcapping = 30.0

    head = head_of(torch.nn.Linear(3, 5), Config())
    assert (head.scale, head.softcap) == (0.25, 30.0)
    assert head.bias is not None
    assert head_of(torch.nn.Linear(3, 5, bias=False), object()).scale == 1.0
    for module in (None, torch.nn.Embedding(5, 3), torch.nn.Identity()):
        with pytest.raises(ValueError, match="not a plain linear layer"):
            head_of(module, object())
