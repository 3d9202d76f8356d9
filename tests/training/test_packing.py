"""Rows end to end give what rows alone give: states, losses and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftline.training import packing
from siftline.training.objectives import read_tokens, token_scores
from siftline.training.packing import (
    NAME,
    PADDING,
    Row,
    check_head,
    choose,
    length_groups,
    packed,
    padded,
)

LENGTHS = (3, 17, 8, 1, 12)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small spend their time in waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(lengths=LENGTHS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        tokens = torch.randint(3, 97, (n,), generator=draw)
        labels = tokens.clone()
        labels[: max(1, n // 2)] = -100
        made.append(Row(tokens, labels))
    return made


def model_of(kind, **more):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    read_tokens(model)
    return model


def outcome(model, groups):
    """Mean log-probability over all labelled tokens, and every gradient."""
    model.zero_grad()
    logprobs = torch.cat([model(**group, reader=token_scores).logprobs for group in groups])
    loss = -logprobs.sum() / len(logprobs)
    loss.backward()
    return loss.item(), {
        name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None
    }


def same(one, other):
    assert one[0] == pytest.approx(other[0], abs=2e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {}), ("Qwen2", {}), ("Mistral", {"sliding_window": 5, "head_dim": 8})],
)
def test_packed_unpacked_and_padded_on_either_side_are_one_update(kind, more):
    model = model_of(kind, **more)
    alone = outcome(model, [padded([row], 0) for row in rows()])
    same(outcome(model, [padded(rows(), 0)]), alone)
    same(outcome(model, [padded(rows(), 0, left=True)]), alone)
    groups = [[rows()[i] for i in group] for group in length_groups(LENGTHS)]
    same(outcome(model, [padded(group, 0) for group in groups]), alone)
    assert choose(model) is None
    assert model.config._attn_implementation == NAME
    same(outcome(model, [packed(rows())]), alone)
    same(outcome(model, [packed(rows()[::-1])]), alone)


def test_a_row_sees_no_other_row():
    model = model_of("Llama")
    assert choose(model) is None
    one, other = rows(), rows(seed=1)
    other[1] = one[1]  # all rows but one are different
    states = []
    for each in (one, other):
        bounds = packed(each)["cu_seq_lens_q"].tolist()
        with torch.no_grad():
            hidden = model.model(**{k: v for k, v in packed(each).items() if k != "labels"})[0][0]
        states.append(hidden[bounds[1] : bounds[2]])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_loss_is_that_of_the_models_own_logits():
    model = model_of("Llama")
    (row,) = rows((14,))
    arguments = padded([row], 0)
    with torch.no_grad():
        own = model(**arguments).loss.item()
        ours = -model(**arguments, reader=token_scores).logprobs.mean().item()
    assert ours == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 50.0}, "softcap can't be packed"),
        (
            "Lfm2",
            {
                "full_attn_idxs": [1],
                "block_multiple_of": 8,
                "layer_types": ["conv", "full_attention"],
            },
            "rows see each other",
        ),
    ],
)
def test_a_model_that_can_not_be_packed_is_told_by_itself(kind, more, reason):
    model = model_of(kind, **more)
    before = model.config._attn_implementation
    assert reason in choose(model)
    assert model.config._attn_implementation == before
    alone = outcome(model, [padded([row], 0) for row in rows((5, 9))])
    same(outcome(model, [padded(rows((5, 9)), 0)]), alone)


def test_a_head_that_is_not_known_is_refused():
    model = model_of("Llama")
    check_head(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) * 1.5
    with pytest.raises(ValueError, match="changes its logits in a way that training does not know"):
        check_head(model)


def test_a_mixture_of_experts_reports_its_balance():
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = model_of("Mixtral", **more)
    arguments = padded(rows(), 0)
    with torch.no_grad():
        own = model(**arguments)
        balance = model(**arguments, reader=lambda states: states.balance)
    assert balance.item() == pytest.approx(own.aux_loss.item(), abs=1e-6)


def test_gradient_checkpointing_changes_nothing():
    model = model_of("Llama")
    assert choose(model) is None
    plain = outcome(model, [packed(rows())])
    model.train()
    model.gradient_checkpointing_enable()
    same(outcome(model, [packed(rows())]), plain)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60))
def test_groups_hold_every_row_once_with_little_padding(lengths):
    groups = length_groups(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        real = sum(lengths[i] for i in group)
        assert real >= (1 - PADDING) * len(group) * max(lengths[i] for i in group) - 1e-9


def test_attention_refuses_what_it_does_not_know():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="no row bounds"):
        packing.packed_attention(torch.nn.Module(), q, q, q, None)
    one_way = torch.nn.Module()
    one_way.is_causal = False
    bounds = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="not causal"):
        packing.packed_attention(one_way, q, q, q, None, cu_seq_lens_q=bounds, max_length_q=4)


@pytest.mark.gpu
def test_the_kernel_of_a_gpu_gives_what_rows_alone_give():
    for kind, more in (("Llama", {}), ("Mistral", {"sliding_window": 5, "head_dim": 8})):
        model = model_of(kind, **more | {"hidden_size": 64, "head_dim": 16})
        model = model.to("cuda", torch.bfloat16)
        assert choose(model) is None
