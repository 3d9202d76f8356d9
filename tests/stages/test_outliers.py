"""The likelihood gate: planted faults, the drop limit, streaming, groups."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from siftline.rows.schema import digest
from siftline.rows.selection import select
from siftline.stages.likelihood.decide import LikelihoodOutliers, robust_scale


def pool(n=2000, seed=0):
    """Two sources at different levels; longer responses are likelier, as in real data."""
    g = np.random.default_rng(seed)
    source = np.where(g.random(n) < 0.5, "easy", "hard")
    tokens = g.integers(5, 400, n)
    level = np.where(source == "easy", -0.5, -2.0) + 0.3 * np.log(tokens / 100)
    return pl.DataFrame(
        {
            "id": [digest(i) for i in range(n)],
            "source": source,
            "n_tokens": tokens,
            "logprob_mean": level + g.normal(0, 0.15, n),
        }
    )


def plant(frame, rows, value):
    planted = pl.Series("logprob_mean", frame["logprob_mean"]).scatter(rows, value)
    return frame.with_columns(planted)


def test_planted_garbage_goes_and_nothing_else():
    frame = pool()
    rows = frame.with_row_index().filter(pl.col("source") == "easy")["index"][:10].to_list()
    # -1.9 is ordinary for the hard source: only a comparison within the source can see it.
    frame = plant(frame, rows, -1.9)
    result = select(LikelihoodOutliers(), frame)
    planted = set(frame["id"].gather(rows))
    assert planted <= set(result.removed["id"])
    assert result.removed.height <= 20
    assert set(result.removed["reason"]) == {"likelihood_outlier_low"}
    assert (result.removed["value"] < result.removed["threshold"]).all()
    assert (
        (result.decisions.filter("kept").select(pl.col("value") >= pl.col("threshold")))
        .to_series()
        .all()
    )


def test_clean_data_loses_almost_nothing():
    assert select(LikelihoodOutliers(), pool()).removed.height <= 4


def test_high_tail_only_when_asked():
    frame = plant(pool(), [1, 2, 3], 1.5)
    assert not set(select(LikelihoodOutliers(), frame).removed["id"]) & set(frame["id"][1:4])
    both = select(LikelihoodOutliers(tail="both"), frame).removed
    high = both.filter(pl.col("reason") == "likelihood_outlier_high")
    assert set(frame["id"][1:4]) <= set(high["id"])
    assert (high["value"] > high["threshold"]).all()


def test_limit_keeps_the_worst_only_and_ties_at_the_limit_stay():
    frame = plant(pool(), list(range(100)), -9.0 - np.arange(100) * 0.01)
    result = select(LikelihoodOutliers(max_drop=0.01), frame)
    assert result.removed.height == 20
    assert result.facts["cut"] > 3.5
    same = plant(pool(), list(range(100)), -9.0).with_columns(
        pl.lit("one").alias("source"), pl.lit(7).alias("n_tokens")
    )
    assert select(LikelihoodOutliers(max_drop=0.01), same).removed.is_empty()
    assert select(LikelihoodOutliers(max_drop=0.05), same).removed.height == 100
    assert select(LikelihoodOutliers(max_drop=0.0), frame).vacuous


def test_small_sources_are_not_judged():
    frame = pl.concat([pool(), pool(20, seed=1).with_columns(pl.lit("tiny").alias("source"))])
    frame = frame.with_columns(
        logprob_mean=pl.when(pl.col("source") == "tiny").then(-99.0).otherwise("logprob_mean")
    ).unique("id", keep="last", maintain_order=True)
    result = select(LikelihoodOutliers(), frame)
    tiny = frame.filter(pl.col("source") == "tiny")["id"]
    assert set(tiny) <= set(result.kept)
    assert result.facts["unjudged"] == 20


def test_groups_are_large_enough_and_match_scipy():
    frame = pool()
    result = select(LikelihoodOutliers(), frame)
    groups = result.tables["groups"]
    assert groups.height == 8
    assert groups["rows"].min() >= 50
    assert groups["rows"].sum() == frame.height
    for source, own in frame.group_by("source"):
        starts = groups.filter(pl.col("source") == source[0])["n_tokens_from"].to_numpy()
        held = np.searchsorted(starts, own["n_tokens"].to_numpy(), side="right") - 1
        rows = groups.filter(pl.col("source") == source[0])["rows"].to_list()
        assert np.bincount(held).tolist() == rows
    easy = groups.filter(pl.col("source") == "easy").sort("n_tokens_from")["n_tokens_from"]
    longest = frame.filter((pl.col("source") == "easy") & (pl.col("n_tokens") >= easy[3]))
    row = groups.filter((pl.col("source") == "easy") & (pl.col("n_tokens_from") == easy[3]))
    values = longest["logprob_mean"].to_numpy()
    assert row["rows"][0] == len(values)
    assert row["median"][0] == pytest.approx(np.median(values))
    assert row["scale"][0] == pytest.approx(median_abs_deviation(values, scale="normal"), rel=1e-4)


def test_scale_survives_many_equal_values():
    assert robust_scale(np.array([1.0, 1, 1, 1, 5])) == (1.0, pytest.approx(1.2533 * 0.8))
    assert robust_scale(np.ones(5)) == (1.0, 0.0)


def test_shuffled_and_split_input_gives_the_same_decisions():
    frame = plant(pool(), list(range(15)), -6.0).with_columns(
        source=pl.when(pl.col("n_tokens") % 7 == 0).then(None).otherwise("source")
    )
    selector = LikelihoodOutliers(tail="both")
    whole = select(selector, frame)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=3)
    parts = [shuffled[:1], shuffled[1:700], shuffled[700:]]
    plan = selector.decide([selector.summarise(part) for part in reversed(parts)])
    pieces = pl.concat([selector.apply(part, plan).decisions for part in parts]).sort("id")
    assert pieces.equals(whole.decisions)
    assert whole.removed.height >= 15


def test_one_percent_more_rows_changes_few_decisions():
    frame = plant(pool(4040), list(range(0, 4040, 100)), -7.0)
    before = set(select(LikelihoodOutliers(), frame[:4000]).removed["id"])
    after = set(select(LikelihoodOutliers(), frame).removed["id"])
    assert len(before ^ (after & set(frame["id"][:4000]))) <= 6
    assert len(before) >= 38


rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]),
        st.integers(1, 9),
        st.sampled_from([-1.0, -1.5, -2.0, -9.0]),
    ),
    max_size=80,
)


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from([0.0, 0.05, 0.5]), st.sampled_from(["low", "both"]))
def test_every_row_is_decided_once_and_the_limit_holds(data, max_drop, tail):
    frame = pl.DataFrame(
        [(f"{i:03d}", *row) for i, row in enumerate(data)],
        schema={
            "id": pl.String,
            "source": pl.String,
            "n_tokens": pl.Int64,
            "logprob_mean": pl.Float64,
        },
        orient="row",
    )
    result = select(LikelihoodOutliers(max_drop=max_drop, tail=tail, min_group=5), frame)
    assert result.decisions["id"].to_list() == frame["id"].to_list()
    assert result.removed.height <= max_drop * frame.height


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 rows have no finite logprob_mean"):
        select(LikelihoodOutliers(), plant(pool(100), [5], float("nan")))
    for bad in ({"max_drop": 1.5}, {"cut": 0.0}, {"tail": "up"}, {"min_group": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LikelihoodOutliers(**bad)
