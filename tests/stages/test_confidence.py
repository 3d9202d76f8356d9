"""The confidence gate: formula, thresholds and ties, planted noise, the ROC interval."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from siftline.rows.schema import digest
from siftline.rows.selection import select
from siftline.scoring.measures.consistency import reflection_from_choices
from siftline.stages.confidence.decide import ConfidenceGate, auroc, consistency, weighted_mean

SCORES = {"id": pl.String, "agreement": pl.Float64, "reflection": pl.Float64}


def frame(*rows):
    return pl.DataFrame(list(rows), schema=SCORES, orient="row")


def values(result):
    return dict(result.decisions.select("id", "value").iter_rows())


def test_confidence_is_the_weighted_mean_of_what_is_there():
    table = frame(("a", 0.5, 1.0), ("b", 0.4, None), ("c", None, 0.9), ("d", None, None))
    result = select(ConfidenceGate(), table)
    assert values(result) == {
        "a": pytest.approx(0.7 * 0.5 + 0.3),
        "b": pytest.approx(0.4),
        "c": pytest.approx(0.9),
        "d": None,
    }
    assert result.kept.to_list() == ["a", "c"]
    reasons = dict(result.removed.select("id", "reason").iter_rows())
    assert reasons == {"b": "low_confidence", "d": "no_confidence"}
    assert result.facts["no_confidence"] == ["d"]
    assert sum(result.facts["histogram"]) == result.facts["scored"] == 3


def test_nan_counts_as_missing_and_weight_zero_as_absent():
    table = frame(("a", float("nan"), 0.8), ("b", 0.8, float("nan")))
    result = select(ConfidenceGate(weights={"agreement": 1.0, "reflection": 0.0}), table)
    assert result.kept.to_list() == ["b"]
    assert result.facts["no_confidence"] == ["a"]
    assert result.facts["missing"] == {"agreement": 1}


def test_parts_weigh_by_name_and_the_missing_ones_are_counted():
    weights = {"perplexity": 2.0, "jaccard": 1.0, "nli": 1.0, "embedding": 0.0}
    gate = ConfidenceGate(weights=weights)
    assert gate.parts == ("jaccard", "nli", "perplexity")
    columns = ("jaccard", "nli", "perplexity")
    lines = [("a", 0.2, 0.6, 1.0), ("b", None, None, 0.4), ("c", 0.8, None, None)]
    types = {"id": pl.String, **dict.fromkeys(columns, pl.Float64)}
    result = select(gate, pl.DataFrame(lines, schema=types, orient="row"))
    assert values(result) == {"a": pytest.approx(0.7), "b": 0.4, "c": 0.8}
    assert result.facts["missing"] == {"jaccard": 1, "nli": 2, "perplexity": 1}
    # A part's scale and the order in which the recipe names them do not matter.
    turned = {name: 10 * w for name, w in reversed(weights.items())}
    again = select(ConfidenceGate(weights=turned), pl.DataFrame(lines, schema=types, orient="row"))
    assert values(again) == {k: pytest.approx(v) for k, v in values(result).items()}


@pytest.mark.parametrize(
    ("scores", "cut", "kept"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.5, 3),
        ([0.1, 0.5, 0.5, 0.5], 0.5, 3),  # ties at the threshold stay
        ([0.5, 0.5, 0.5, 0.5], 0.5, 4),
        ([0.1, 0.2, 0.3, 0.4], 0.0, 4),
        ([0.1, 0.2, 0.3, 0.4], 1.0, 1),
    ],
)
def test_quantile_thresholds(scores, cut, kept):
    table = frame(*((f"{i}", s, s) for i, s in enumerate(scores)))
    result = select(ConfidenceGate("quantile", cut), table)
    assert result.kept.len() == kept
    if cut == 0.5:
        median = select(ConfidenceGate("median"), table)
        assert median.decisions.equals(result.decisions)
        # CLEAR's rule against numpy's median, ties kept.
        assert kept == sum(np.array(scores) >= np.median(scores))


def test_absolute_threshold_keeps_the_tie():
    table = frame(("a", 0.6, None), ("b", 0.6 - 1e-12, None))
    assert select(ConfidenceGate(cut=0.6), table).kept.to_list() == ["a"]


def test_planted_swaps_go_first():
    g = np.random.default_rng(0)
    n = 1000
    swapped = np.arange(n) % 5 == 0
    agree = g.binomial(5, np.where(swapped, 0.1, 0.7)) / 5
    belief = np.clip(g.normal(np.where(swapped, 0.4, 0.7), 0.2), 0, 1)
    table = frame(*((digest(i), a, b) for i, (a, b) in enumerate(zip(agree, belief, strict=True))))
    result = select(ConfidenceGate("quantile", 0.2), table)
    removed = set(result.removed["id"])
    caught = sum(digest(i) in removed for i in np.flatnonzero(swapped).tolist())
    assert caught > 150  # of 200; a random fifth would catch 40
    assert 150 <= len(removed) <= 200


scores = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(scores, scores), max_size=40),
    st.sampled_from(["absolute", "quantile"]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.randoms(),
)
def test_split_and_shuffled_input_gives_the_same_decisions(data, threshold, cut, random):
    table = frame(*((f"{i:03d}", *pair) for i, pair in enumerate(data)))
    gate = ConfidenceGate(threshold, cut)
    whole = select(gate, table)
    order = list(range(table.height))
    random.shuffle(order)
    shuffled = table[order]
    parts = [shuffled[: len(order) // 3], shuffled[len(order) // 3 :]]
    plan = gate.decide([gate.summarise(part) for part in parts])
    pieces = pl.concat([gate.apply(part, plan).decisions for part in parts]).sort("id")
    assert pieces.equals(whole.decisions)
    low = whole.removed.filter(pl.col("reason") == "low_confidence")
    assert (low["value"] < low["threshold"]).all()
    if threshold == "quantile":
        assert low.height <= cut * whole.facts["scored"] + 1e-9


def test_bad_configuration_and_scores_are_refused():
    for bad in ({"threshold": "mean"}, {"cut": 1.2}, {"weights": {"agreement": -0.1}}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ConfidenceGate(**bad)
    with pytest.raises(ValueError, match="no part 'jacard': did you mean 'jaccard'"):
        ConfidenceGate(weights={"jacard": 1.0})
    with pytest.raises(ValueError, match="at least one part a weight above 0"):
        ConfidenceGate(weights={"agreement": 0.0})
    with pytest.raises(ValueError, match="leave it out"):
        ConfidenceGate("median", 0.4)
    with pytest.raises(ValueError, match=r"1 rows have a score outside \[0, 1\], first b"):
        select(ConfidenceGate(), frame(("a", 0.5, 0.5), ("b", 0.5, 3.0)))


def test_weighted_mean_matches_tlm_arithmetic():
    parts = np.array([[0.2, 0.6, 1.0], [np.nan, 0.6, 1.0], [np.nan] * 3])
    found = weighted_mean(parts, np.array([0.32, 0.48, 0.2]))
    assert found[0] == pytest.approx(0.32 * 0.2 + 0.48 * 0.6 + 0.2)
    assert found[1] == pytest.approx((0.48 * 0.6 + 0.2) / 0.68)
    assert np.isnan(found[2])


def test_consistency():
    assert consistency(["4", "5", None, "4"], "4") == 0.5
    # What can't be read disagrees with nothing: it is missing.
    assert consistency([None, None], None) is None
    assert consistency(["4", "5"], None) is None
    assert consistency([None, None], "4") is None
    assert consistency([], "4") is None


def test_reflection_is_the_softmax_expectation():
    logprobs = np.log(np.array([[0.3, 0.1, 0.1], [0.05, 0.05, 0.4]], dtype=np.float32))
    found = reflection_from_choices(logprobs, (1.0, 0.0, 0.5))
    np.testing.assert_allclose(found, [0.7, 0.5], atol=1e-6)
    # Shifted log-probabilities mean the same, also where exp() would underflow.
    np.testing.assert_allclose(
        reflection_from_choices(logprobs - 2000, (1.0, 0.0, 0.5)), found, atol=1e-4
    )
    assert reflection_from_choices(np.array([[-1.0, -1.0]]), (1.0, 0.0)).tolist() == [0.5]
    with pytest.raises(ValueError, match="one per choice"):
        reflection_from_choices(logprobs, (1.0, 0.0))


def delong_variance(positive, negative):
    """The textbook quadratic form, pair by pair."""
    psi = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    return psi.mean(1).var(ddof=1) / len(positive) + psi.mean(0).var(ddof=1) / len(negative)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10**6))
def test_auroc_matches_sklearn_and_delong(m, n, seed):
    g = np.random.default_rng(seed)
    labels = np.r_[np.ones(m), np.zeros(n)].astype(bool)
    ranked = np.round(g.normal(labels * 0.8), 1)  # rounded: many ties
    found = auroc(ranked, labels)
    assert found.value == pytest.approx(roc_auc_score(labels, ranked))
    assert 0 <= found.low <= found.value <= found.high <= 1
    if 0 < found.value < 1:
        width = np.log(found.high / (1 - found.high)) - np.log(found.low / (1 - found.low))
        sd = np.sqrt(delong_variance(ranked[labels], ranked[~labels]))
        assert width == pytest.approx(2 * 1.959964 * sd / (found.value * (1 - found.value)))


def test_auroc_interval_covers_the_truth():
    labels = np.arange(120) % 3 == 0
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    g = np.random.default_rng(0)
    found = [auroc(g.normal(labels * 1.0), labels) for _ in range(400)]
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert 0.92 <= covered <= 0.98


def test_auroc_decides_whether_reflection_counts():
    g = np.random.default_rng(1)
    labels = np.arange(200) % 2 == 0
    assert auroc(g.normal(labels * 1.0), labels).informative
    assert not auroc(g.normal(size=200), labels).informative
    assert not auroc(-labels.astype(float), labels).informative
    # A perfect ranking of few rows proves nothing.
    assert not auroc(np.arange(10), np.arange(10) >= 5).informative
    assert auroc(np.arange(12), np.arange(12) >= 6).informative
    assert auroc(np.zeros(9), np.arange(9) > 4) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="at least 2 of each"):
        auroc(np.arange(5), np.arange(5) > 3)
