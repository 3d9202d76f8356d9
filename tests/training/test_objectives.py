"""Objectives and the primitive below them: known numbers, dense references, finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.projection import Head
from siftline.training import objectives as primitive
from siftline.training.material import Corruption, balanced, references_of
from siftline.training.objectives import (
    KINDS,
    Lesson,
    Objective,
    States,
    TokenScores,
    dft,
    poft,
    row_means,
    sft,
    token_scores,
)

LOGITS = [1.0, 0.0, -1.0]
REFERENCE = [0.5, 0.2, -0.3]


def of_logits(logits, targets, reference=None):
    """Scores of logits given as they are: hidden states through an identity head."""
    eye = Head(torch.eye(logits.shape[1], dtype=logits.dtype))
    other = None if reference is None else States(reference, eye, targets)
    return token_scores(States(logits, eye, targets), other)


def whole(n):
    """A lesson of one row of n tokens, all of weight 1."""
    return Lesson(torch.ones(n), torch.zeros(n, dtype=torch.int64), torch.ones(1))


def published():
    logits = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([REFERENCE], dtype=torch.float64)
    return logits, torch.tensor([0]), reference


@pytest.mark.parametrize(
    ("kind", "loss", "gradient"),
    [
        ("sft", 0.407606, (-0.33476, 0.24473, 0.09003)),
        ("dft", 0.271156, (-0.22270, 0.16280, 0.05989)),
        ("asft", 0.276486, (-0.21226, 0.15813, 0.05414)),
    ],
)
def test_losses_and_gradients_of_three_logits(kind, loss, gradient):
    logits, target, reference = published()
    scores = of_logits(logits, target, reference)
    outcome = Objective(kind, 0.05)(scores, whole(1))
    outcome.loss.backward()
    assert outcome.loss.item() == pytest.approx(loss, abs=1e-5)
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-5)


def test_the_divergence_of_three_logits():
    logits, target, reference = published()
    kl = of_logits(logits, target, reference).kl
    kl.sum().backward()
    assert kl.item() == pytest.approx(0.106604, abs=1e-6)
    assert logits.grad[0].tolist() == pytest.approx((0.20865, -0.09352, -0.11513), abs=1e-5)


def test_the_preference_of_two_means():
    mean = torch.tensor([-1.2], dtype=torch.float64, requires_grad=True)
    loss = poft(mean, torch.tensor([-0.8], dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(0.913015, abs=1e-6)
    assert -mean.grad.item() == pytest.approx(0.598688, abs=1e-6)


# ---- the primitive ----------------------------------------------------------------------------


def problem(n=23, hidden=6, entries=11, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    return {
        "hidden": normal(n, hidden),
        "weight": normal(entries, hidden),
        "bias": normal(entries),
        "other": normal(n, hidden),
        "other_weight": normal(entries, hidden),
        "targets": torch.randint(entries, (n,), generator=draw),
    }


def dense(p, scale, softcap):
    """Log-probabilities and divergences by their definitions, all logits at once."""

    def logs(hidden, weight, bias):
        logits = (hidden @ weight.t() + bias) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(dim=1)

    own = logs(p["hidden"], p["weight"], p["bias"])
    other = logs(p["other"], p["other_weight"], p["bias"].detach())
    kl = torch.nn.functional.kl_div(own, other, log_target=True, reduction="none").sum(dim=1)
    return own.gather(1, p["targets"][:, None])[:, 0], kl


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 3.0)])
@pytest.mark.parametrize("kept", [True, False])
def test_tiles_give_what_all_logits_at_once_give(monkeypatch, scale, softcap, kept):
    monkeypatch.setattr(primitive, "TILE_BYTES", {"cpu": 4 * 11 * 5, "cuda": 1})  # 5 rows a tile
    monkeypatch.setattr(primitive, "KEPT_BYTES", 1 << 20 if kept else 0)
    p = problem()
    leaves = [p[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    head = Head(p["weight"], p["bias"], scale, softcap)
    other = States(p["other"], Head(p["other_weight"], p["bias"].detach(), scale, softcap), None)
    scores = token_scores(States(p["hidden"], head, p["targets"]), other)
    expected = dense(p, scale, softcap)
    ramp = torch.linspace(-1, 2, 23, dtype=torch.float64)

    def gradients(logprobs, kl):
        total = (logprobs * ramp).sum() + (kl * ramp.flip(0)).sum()
        return torch.autograd.grad(total, leaves, retain_graph=True)

    ours, again = (gradients(scores.logprobs, scores.kl) for _ in range(2))
    theirs = gradients(*expected)
    torch.testing.assert_close(scores.logprobs, expected[0])
    torch.testing.assert_close(scores.kl, expected[1])
    for one, two, three in zip(ours, again, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        torch.testing.assert_close(one, three)


def test_a_frozen_head_gets_no_gradient():
    p = problem()
    p["hidden"].requires_grad_()
    scores = token_scores(States(p["hidden"], Head(p["weight"], p["bias"]), p["targets"]))
    scores.logprobs.sum().backward()
    assert scores.kl is None
    assert p["weight"].grad is None
    assert p["hidden"].grad.abs().sum() > 0


def test_half_precision_products_are_summed_in_float32():
    p = problem(n=400, hidden=32, entries=200, dtype=torch.float32)
    weight = p["weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = token_scores(States(p["hidden"], Head(weight), p["targets"]))
    scores.logprobs.sum().backward()
    assert scores.logprobs.dtype == weight.grad.dtype == torch.float32
    exact = weight.detach().clone().requires_grad_()
    logits = p["hidden"] @ exact.t()
    logits.log_softmax(dim=1).gather(1, p["targets"][:, None]).sum().backward()
    error = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert 1e-5 < error < 0.02  # bfloat16 has 8 bits: half a percent of a product


# ---- every objective ----------------------------------------------------------------------------


def scored(logits, targets, reference, kind):
    return of_logits(logits, targets, reference if kind in ("asft", "sft_kl") else None)


def lesson_of(rows, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Lesson(
        torch.rand(len(rows), generator=draw, dtype=torch.float64) + 0.5,
        rows,
        torch.rand(count, generator=draw, dtype=torch.float64) + 0.5,
        -torch.rand(count, generator=draw, dtype=torch.float64),
    )


def finite_differences(function, point, step=1e-6):
    flat = torch.zeros_like(point)
    for place in np.ndindex(*point.shape):
        for sign in (1, -1):
            moved = point.detach().clone()
            moved[place] += sign * step
            flat[place] += sign * function(moved) / (2 * step)
    return flat


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    p = problem(n=7, entries=4)
    logits = p["hidden"][:, :4].clone().requires_grad_()
    reference, targets = p["other"][:, :4], p["targets"] % 4
    lesson = lesson_of(torch.tensor([0, 0, 0, 1, 1, 2, 2]), 3)
    objective = Objective(kind, 0.3)
    objective(scored(logits, targets, reference, kind), lesson).loss.backward()
    fixed = logits.detach().log_softmax(dim=1).gather(1, targets[:, None])[:, 0].exp()

    def frozen(at):
        scores = scored(at, targets, reference, kind)
        if kind not in ("dft", "asft"):
            return objective(scores, lesson).loss.item()
        losses = -fixed * scores.logprobs
        if kind == "asft":
            losses = losses + 0.3 * scores.kl
        return (losses * lesson.weights).sum().item()

    torch.testing.assert_close(
        logits.grad, finite_differences(frozen, logits), rtol=1e-5, atol=1e-7
    )
    if kind in ("dft", "asft"):

        def loose(at):
            return objective(scored(at, targets, reference, kind), lesson).loss.item()

        moving = finite_differences(loose, logits)
        assert (moving - logits.grad).abs().max() > 0.01, "the weight must not be differentiated"


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=30))
def test_dft_is_never_above_sft(logs):
    values = torch.tensor(logs, dtype=torch.float64)
    assert (dft(values) <= sft(values)).all()
    assert (dft(values) >= 0).all()


def test_asft_without_weight_is_dft_and_sft_kl_is_sft():
    p = problem()
    lesson = lesson_of(torch.zeros(23, dtype=torch.int64), 1)
    scores = of_logits(p["hidden"], p["targets"] % 6, p["other"])
    assert torch.equal(
        Objective("asft", 0.0)(scores, lesson).loss, Objective("dft")(scores, lesson).loss
    )
    assert torch.equal(
        Objective("sft_kl", 0.0)(scores, lesson).loss, Objective("sft")(scores, lesson).loss
    )


def test_the_start_is_at_no_distance_from_itself():
    p = problem()
    hidden = p["hidden"].requires_grad_()
    kl = of_logits(hidden, p["targets"] % 6, hidden.detach()).kl
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    assert torch.equal(kl, torch.zeros(23, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(hidden))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_poft_does_not_care_for_the_order_of_rows(sizes, random):
    total = sum(sizes)
    logs = -torch.rand(total, generator=torch.Generator().manual_seed(total), dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    lesson = lesson_of(rows, len(sizes))
    order = list(range(len(sizes)))
    random.shuffle(order)
    place = torch.tensor([i for row in order for i in range(total) if rows[i] == row])
    shuffled = Lesson(
        lesson.weights[place],
        torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)[order]),
        lesson.row_weights[order],
        lesson.references[order],
    )
    one = Objective("poft")(TokenScores(logs), lesson)
    other = Objective("poft")(TokenScores(logs[place]), shuffled)
    torch.testing.assert_close(one.loss, other.loss)
    tau = one.sums["mean_weight"] / lesson.row_weights.sum()
    assert 0 < tau < 1
    torch.testing.assert_close(one.sums["mean_weight"], other.sums["mean_weight"])


def test_row_means_weigh_long_and_short_rows_alike():
    logs = torch.tensor([-1.0, -3.0, -5.0, -7.0])
    assert row_means(logs, torch.tensor([0, 0, 0, 1]), 2).tolist() == [-3.0, -7.0]


def test_sft_and_dft_rank_two_targets_in_opposite_order():
    likely, unlikely = torch.tensor([0.5, 0.05]).log()
    assert sft(likely) < sft(unlikely)
    assert dft(likely) > dft(unlikely)


def test_what_an_objective_reports():
    p = problem()
    lesson = whole(23)
    scores = of_logits(p["hidden"], p["targets"] % 6, p["other"])
    told = Objective("asft")(scores, lesson).sums
    assert told.keys() == {"ce", "kl", "mean_weight"}
    assert told["ce"].item() == pytest.approx(-scores.logprobs.sum().item())
    assert told["mean_weight"].item() == pytest.approx(scores.logprobs.exp().sum().item())
    assert Objective("sft")(TokenScores(scores.logprobs), lesson).sums == {}


# ---- masked thought, balance, references ---------------------------------------------------------


def corruption(rate=0.4, seed=0):
    return Corruption(rate, np.arange(3, 60), np.array([0, 1, 2]), seed)


def test_the_rate_of_masked_thought_rises_over_two_thirds_of_the_steps():
    rates = [corruption().rate_at(step, 30) for step in range(30)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.2)
    assert rates[20:] == [0.4] * 10
    assert all(b >= a for a, b in itertools.pairwise(rates))


def test_masked_thought_leaves_prompt_and_end_alone_and_meets_its_rate():
    changed = total = 0
    for row in range(40):
        tokens = np.full(203, 99, dtype=np.int32)
        tokens[-1] = 1
        new = corruption().apply(tokens, 3, f"row{row}", 7, 0.3)
        assert (new[:3] == 99).all()
        assert new[-1] == 1
        assert (tokens[3:-1] == 99).all(), "the row itself was written to"
        assert set(new[3:-1].tolist()) <= {99, *range(3, 60)}
        changed += int((new[3:-1] != 99).sum())
        total += 199
    assert abs(changed - 0.3 * total) < 3 * math.sqrt(total * 0.3 * 0.7)


def test_draws_of_masked_thought_depend_on_row_step_and_seed_alone():
    tokens = np.full(100, 99, dtype=np.int32)
    one = corruption().apply(tokens, 0, "a", 3, 0.5)
    assert np.array_equal(one, corruption().apply(tokens.copy(), 0, "a", 3, 0.5))
    others = [
        corruption().apply(tokens, 0, "b", 3, 0.5),
        corruption().apply(tokens, 0, "a", 4, 0.5),
        corruption(seed=1).apply(tokens, 0, "a", 3, 0.5),
    ]
    assert all(not np.array_equal(one, other) for other in others)
    hit = corruption().apply(tokens, 0, "a", 3, 0.2) != 99
    assert (one[hit] != 99).all(), "a higher rate keeps what a lower one had swapped"
    assert corruption().apply(tokens, 0, "a", 3, 0.0) is tokens


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 90)), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_balance_evens_out_sources_and_keeps_the_mean(rows, strength):
    sources = [source for source, _ in rows]
    tokens = np.array([count for _, count in rows])
    weights = balanced(sources, tokens, strength)
    assert (weights * tokens).sum() == pytest.approx(tokens.sum())
    shares = {s: (weights * tokens)[np.array(sources) == s].sum() for s in set(sources)}
    plain = {s: tokens[np.array(sources) == s].sum() for s in set(sources)}
    for one in shares:
        for other in shares:
            expected = (plain[one] / plain[other]) ** (1 - strength)
            assert shares[one] / shares[other] == pytest.approx(expected)


def test_references_are_matched_by_id():
    assert references_of(["b", "a"], {"a": -1.0, "b": -2.0, "c": 0.0}).tolist() == [-2.0, -1.0]
    with pytest.raises(ValueError, match="1 of 2 rows have no reference score \\(x is one\\)"):
        references_of(["a", "x"], {"a": -1.0})
    for wrong in (0.5, math.nan, -math.inf):
        with pytest.raises(ValueError, match="is not a mean log-probability"):
            references_of(["a"], {"a": wrong})
