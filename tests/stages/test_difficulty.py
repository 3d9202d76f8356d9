"""Pass rates, targets, trial plans and acceptance, against published numbers and a plain loop."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.stages.rejection_sampling.difficulty import (
    DRAWS,
    PASS_RATES,
    accept,
    difficulty,
    level_of,
    prop2diff,
    tally,
    targets_for,
    uniform,
)

RATES = [0.0, 0.02, 0.25, 0.5, 0.75]


def draw_frame(*rows):
    """Rows of (prompt, draw, correct, key)."""
    full = [(p, i, f"text {i}", "42", ok, key) for p, i, ok, key in rows]
    return pl.DataFrame(full, schema=DRAWS, orient="row")


def target_frame(**targets):
    return pl.DataFrame(
        {"prompt_id": list(targets), "target": list(targets.values())},
        schema={"prompt_id": pl.String, "target": pl.Int64},
    )


def state(**counts):
    rows = [(p, *c) for p, c in counts.items()]
    return pl.DataFrame(rows, schema=PASS_RATES, orient="row")


def test_published_allocation():
    assert prop2diff(np.array([*RATES, 0.96]), 192).tolist() == [1, 4, 50, 100, 150, 192]
    hardest = np.array([*RATES, 1.0])
    assert prop2diff(hardest, 192, include_unsolved=True).tolist() == [1, 4, 48, 96, 144, 192]
    # By default the unsolved prompt gets the most but sets no scale.
    assert prop2diff(hardest, 192).tolist() == [1, 6, 64, 128, 192, 192]


def test_targets_at_the_edges():
    assert prop2diff(np.array([0.0, 0.0, 1.0]), 8).tolist() == [1, 1, 8]
    assert prop2diff(np.array([1.0, 1.0]), 8).tolist() == [8, 8]
    assert prop2diff(np.array([np.nan, 0.5]), 8).tolist() == [1, 8]
    assert prop2diff(np.array([]), 8).tolist() == []
    assert uniform(3, 40).tolist() == [40, 40, 40]
    with pytest.raises(ValueError, match="give 1 or more"):
        prop2diff(np.array([0.5]), 0)
    with pytest.raises(ValueError, match=r"reach from -0\.1"):
        prop2diff(np.array([-0.1]), 3)
    with pytest.raises(ValueError, match="quantile is 0"):
        prop2diff(np.array([0.1]), 3, quantile=0.0)


def test_one_broken_prompt_is_clipped_by_the_quantile():
    d = np.r_[np.full(999, 0.4), 0.99]
    assert prop2diff(d, 10, quantile=1.0)[0] == 5
    assert prop2diff(d, 10).tolist() == [10] * 1000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 200), st.randoms())
def test_targets_are_within_one_and_k_rise_with_difficulty_and_ignore_order(d, k, random):
    targets = prop2diff(np.array(d), k)
    assert (targets >= 1).all()
    assert (targets <= k).all()
    assert (np.diff(targets[np.argsort(d)]) >= 0).all()
    order = list(range(len(d)))
    random.shuffle(order)
    assert (prop2diff(np.array(d)[order], k) == targets[order]).all()


def test_tally_and_difficulty():
    draws = draw_frame(
        ("p", 0, True, "a"), ("p", 1, True, "a"), ("p", 2, False, "b"), ("p", 3, True, "c"),
        ("q", 0, False, None), ("q", 1, None, None),
    )  # fmt: skip
    rates = tally(draws.sample(fraction=1, shuffle=True, seed=0))
    assert rates.rows() == [("p", 4, 3, 2), ("q", 2, 0, 0)]
    assert rates.schema == PASS_RATES
    assert difficulty(rates)["difficulty"].to_list() == [0.25, 1.0]
    assert difficulty(state(p=(0, 0, 0)))["difficulty"].to_list() == [None]
    with pytest.raises(ValueError, match="more correct draws than trials, first p"):
        difficulty(state(p=(1, 2, 2)))
    found = targets_for(state(a=(4, 4, 4), b=(4, 2, 2), c=(4, 1, 1)), "prop2diff", 6)
    assert found["target"].to_list() == [1, 4, 6]


def plain_accept(rows, targets):
    """The rule as one loop: prompt by prompt, draw by draw."""
    out, taken, keys = {}, {}, {}
    for p, i, ok, key in sorted(rows, key=lambda r: (r[0], r[1])):
        if not ok:
            out[p, i] = "incorrect"
        elif (p, key) in keys:
            out[p, i] = "duplicate"
        elif taken.get(p, 0) >= targets[p]:
            out[p, i] = "over_target"
            keys[p, key] = i
        else:
            out[p, i] = None
            keys[p, key] = i
            taken[p] = taken.get(p, 0) + 1
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("pqr"), st.integers(0, 30), st.booleans(), st.sampled_from("abcdef")
        ),
        max_size=60,
        unique_by=lambda r: r[:2],
    ),
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
)
def test_accept_equals_the_plain_loop(rows, ks):
    targets = dict(zip("pqr", ks, strict=True))
    found = accept(draw_frame(*rows), target_frame(**targets))
    expected = plain_accept(rows, targets)
    assert {(r["prompt_id"], r["draw"]): r["reason"] for r in found.to_dicts()} == expected
    taken = found.filter("accepted")
    assert taken.height == sum(reason is None for reason in expected.values())
    for (prompt,), group in taken.group_by("prompt_id"):
        distinct = {key for p, _, ok, key in rows if ok and p == prompt}
        assert group.height == min(targets[prompt], len(distinct))
        assert group["rank"].to_list() == list(range(1, group.height + 1))


def test_exactly_k_and_the_duplicate_names_its_original():
    rows = [("p", 5, True, "a"), ("p", 0, True, "b"), ("p", 2, True, "b"), ("p", 1, False, "c"),
            ("p", 9, True, "d")]  # fmt: skip
    found = accept(draw_frame(*rows), target_frame(p=2))
    assert found.filter("accepted")["draw"].to_list() == [0, 5]
    assert found.filter(pl.col("reason") == "duplicate").select("draw", "matched_draw").rows() == [
        (2, 0)
    ]
    assert found["reason"].to_list() == [None, "incorrect", "duplicate", None, "over_target"]


def test_accept_refuses_broken_tables():
    good = ("p", 0, True, "a")
    for rows, match in (
        ([good, good], "given twice"),
        ([("q", 0, True, "a")], "have no target"),
        ([("p", 0, True, None)], "no dedup key"),
    ):
        with pytest.raises(ValueError, match=match):
            accept(draw_frame(*rows), target_frame(p=1))


def test_levels_are_equal_steps():
    d = [0.0, 0.19, 0.2, 0.4, 0.6, 0.8, 1.0, float("nan")]
    assert level_of(d, 5).tolist() == [1, 1, 2, 3, 4, 5, 5, 0]
    assert level_of([], 5).tolist() == []
