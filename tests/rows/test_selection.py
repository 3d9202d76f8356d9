"""The frame every selector returns, and how many prompts a shortlist asks for."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.rows.selection import DECISION, Selection, decisions, select
from siftline.stages.diversity.decide import Shortlist


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.booleans(), max_size=10))
def test_decisions_are_sorted_typed_and_clear_of_idle_reasons(kept):
    reason = [f"r{i}" for i in range(len(kept))]
    frame = decisions(list(kept), kept=list(kept.values()), reason=reason, value=[0.5] * len(kept))
    assert dict(frame.schema) == DECISION
    assert frame["id"].to_list() == sorted(kept)
    why = dict(zip(kept, reason, strict=True))
    for line in frame.to_dicts():
        assert line["kept"] == kept[line["id"]]
        assert line["reason"] == (None if line["kept"] else why[line["id"]])
        assert line["value"] == 0.5
    chosen = Selection(frame)
    assert set(chosen.kept) == {i for i, k in kept.items() if k}
    assert set(chosen.removed["id"]) == {i for i, k in kept.items() if not k}


def test_columns_may_be_lists_series_a_number_or_nothing():
    frame = decisions(
        pl.Series(["b", "a"]),
        kept=pl.Series([False, True]),
        reason=pl.Series(["near", None]),
        value=[1, None],
        threshold=0.8,
        matched_id=["a", None],
    )
    assert frame.rows() == [
        ("a", True, None, None, 0.8, None),
        ("b", False, "near", 1.0, 0.8, "a"),
    ]
    assert decisions([], kept=[]).height == 0
    assert dict(decisions([], kept=[]).schema) == DECISION


def test_a_removal_without_a_reason_is_our_own_mistake():
    with pytest.raises(AssertionError, match="1 removed rows without a reason"):
        decisions(["a", "b"], kept=[True, False])
    with pytest.raises(AssertionError):
        Selection(pl.DataFrame({"id": ["a"], "kept": [True]}))


class AboveMean:
    """Keeps what is above the mean of all buckets; the plan needs every state."""

    def summarise(self, bucket):
        return bucket["x"].sum(), bucket.height

    def decide(self, states):
        return sum(s for s, _ in states) / sum(n for _, n in states)

    def apply(self, bucket, plan):
        return Selection(
            decisions(
                bucket["id"],
                kept=bucket["x"] > plan,
                reason=["low"] * bucket.height,
                value=bucket["x"],
                threshold=plan,
            )
        )


def test_select_is_the_three_steps_on_one_bucket():
    frame = pl.DataFrame({"id": list("abcd"), "x": [1.0, 2.0, 3.0, 6.0]})
    selector = AboveMean()
    whole = select(selector, frame)
    plan = selector.decide([selector.summarise(frame[:1]), selector.summarise(frame[1:])])
    parts = [selector.apply(part, plan).decisions for part in (frame[:1], frame[1:])]
    assert whole.decisions.equals(pl.concat(parts))
    assert whole.kept.to_list() == ["d"]


@pytest.mark.parametrize(
    ("shortlist", "budget_rows", "prompts", "size"),
    [
        (Shortlist(), 100, 10_000, 300),
        (Shortlist(oversampling=2.0), 100, 10_000, 200),
        (Shortlist(keep_rate=0.5), 100, 10_000, 600),
        (Shortlist(keep_rate=0.7), 100, 10_000, 429),  # rounded up: never fewer than needed
        (Shortlist(size=50), 100, 10_000, 50),
        (Shortlist(), 100, 40, 40),
    ],
)
def test_a_shortlist_asks_for_budget_times_oversampling_over_keep_rate(
    shortlist, budget_rows, prompts, size
):
    assert shortlist.diversity(budget_rows, prompts).size == size


def test_clusters_never_exceed_prompts_and_settings_reach_the_selector():
    given_options = Shortlist(clusters=50, quota="equal", weight="score", seed=7)
    diversity = given_options.diversity(10, 20)
    assert (diversity.clusters, diversity.quota, diversity.seed) == (20, "equal", 7)
    assert diversity.weight == "score"
    assert Shortlist().diversity(10, 20).clusters is None


@pytest.mark.parametrize(
    "wrong",
    [{"oversampling": 0.0}, {"keep_rate": 0.0}, {"clusters": 0}, {"quota": "most"}, {"size": 0}],
)
def test_a_wrong_shortlist_is_refused_before_anything_runs(wrong):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  each says something else
        Shortlist(**wrong)
    assert "\n" not in str(caught.value)
