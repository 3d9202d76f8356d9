"""Calibration: against scikit-learn and plain loops, and on planted confidence."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from siftline.report import plots
from siftline.report.page import CALIBRATION, Report, render
from siftline.stages.confidence.calibration import (
    SHOWN_GROUPS,
    Joint,
    calibration,
    calibration_error,
    cross_fitted,
    kept_by,
    ranking,
    reliability,
    shown,
    too_few,
)

pairs = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda n: n / 10)), st.booleans()),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(pairs)
def test_bins_hold_every_row_once_and_the_error_is_the_plain_sum(data):
    confidence, right = np.array([c for c, _ in data]), np.array([r for _, r in data], bool)
    lines = reliability(confidence, right)
    assert len(lines) == 10
    assert sum(line["rows"] for line in lines) == len(data)
    gap = 0.0
    for line in lines:
        last = line["high"] == 1.0
        inside = [
            (c, r) for c, r in data if line["low"] <= c and (c < line["high"] or (last and c <= 1))
        ]
        assert line["rows"] == len(inside)
        if not inside:
            assert line["confidence"] is line["right"] is None
            continue
        assert line["confidence"] == pytest.approx(np.mean([c for c, _ in inside]))
        assert line["right"] == pytest.approx(np.mean([r for _, r in inside]))
        gap += abs(sum(c for c, _ in inside) - sum(r for _, r in inside))
    error = calibration_error(lines)
    assert error == (pytest.approx(gap / len(data)) if data else None)


def test_bins_are_those_of_scikit_learn():
    g = np.random.default_rng(0)
    confidence = g.random(500)
    right = g.random(500) < confidence**2
    lines = [line for line in reliability(confidence, right) if line["rows"]]
    share, mean = calibration_curve(right, confidence, n_bins=10)
    np.testing.assert_allclose([line["right"] for line in lines], share)
    np.testing.assert_allclose([line["confidence"] for line in lines], mean)


def test_planted_confidence_is_seen_for_what_it_is():
    g = np.random.default_rng(1)
    honest = g.random(20000)
    right = g.random(20000) < honest
    assert calibration_error(reliability(honest, right)) < 0.02
    boastful = 0.5 + honest / 2
    assert calibration_error(reliability(boastful, right)) == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match=r"reach from 0.0 to 1.5: give 0 to 1"):
        reliability(np.array([0.0, 1.5]), np.array([True, False]))


def test_every_part_is_ranked_over_the_rows_that_have_it():
    g = np.random.default_rng(2)
    right = g.random(200) < 0.6
    good, bad = g.normal(right * 1.5), g.normal(size=200)
    squash = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    frame = pl.DataFrame(
        {
            "confidence": squash(good),
            "right": [bool(r) if i % 5 else None for i, r in enumerate(right)],
            "agreement": squash(good),
            "reflection": [float(v) if i % 2 else None for i, v in enumerate(squash(bad))],
            "nli": pl.Series([None] * 200, dtype=pl.Float64),
        }
    )
    found = calibration(frame, ["agreement", "reflection", "nli"])
    known = np.arange(200) % 5 > 0
    assert (found["rows"], found["right"]) == (160, int(right[known].sum()))
    assert found["auroc"]["confidence"] == found["auroc"]["agreement"]
    value = roc_auc_score(right[known], good[known])
    assert found["auroc"]["agreement"]["value"] == pytest.approx(value)
    told = found["auroc"]["reflection"]
    assert told["rows"] == 80
    assert told["low"] < 0.5 < told["high"]
    assert found["auroc"]["nli"] == {"rows": 0, "value": None, "low": None, "high": None}
    turned = calibration(frame[::-1], ["agreement", "reflection", "nli"])
    assert turned == found


def test_nothing_to_rank_and_nothing_known():
    assert ranking(np.array([0.1, 0.9]), np.array([True, True]))["value"] is None
    empty = pl.DataFrame(schema={"confidence": pl.Float64, "right": pl.Boolean})
    found = calibration(empty, [])
    assert (found["rows"], found["error"]) == (0, None)


def test_shares_kept_by_group():
    g = np.random.default_rng(3)
    sources = [None if i % 7 == 0 else f"s{int(n)}" for i, n in enumerate(g.integers(0, 30, 900))]
    kept = (g.random(900) < 0.4).tolist()
    frame = pl.DataFrame({"source": sources, "kept": kept})
    table = kept_by(frame, "source")
    for line in table.to_dicts():
        mine = [k for s, k in zip(sources, kept, strict=True) if s == line["group"]]
        assert (line["rows"], line["kept"]) == (len(mine), sum(mine))
        assert line["share"] == pytest.approx(sum(mine) / len(mine))
    assert table["rows"].to_list() == sorted(table["rows"], reverse=True)
    facts = shown(table)
    assert len(facts) == SHOWN_GROUPS + 1
    assert sum(f["rows"] for f in facts.values()) == sum(s is not None for s in sources)
    assert sum(f["kept"] for f in facts.values()) == table["kept"].sum()
    assert kept_by(frame[::-1], "source").equals(table)


def test_the_report_shows_a_reliability_diagram_where_rows_are_known():
    g = np.random.default_rng(4)
    confidence = g.random(300) * 0.8
    bins = reliability(confidence, g.random(300) < confidence)
    frame = pl.DataFrame([{"stage": "confidence", **line} for line in bins], schema=CALIBRATION)
    page = render(Report("r", "v", "m", calibration=frame))
    assert f"300 rows, expected calibration error {calibration_error(bins):.4g}." in page
    assert 'alt="reliability of confidence"' in page
    assert page == render(Report("r", "v", "m", calibration=frame))
    assert 'id="calibration"' not in render(Report("r", "v", "m"))
    arrays = [frame[name].fill_null(float("nan")).to_numpy() for name in list(CALIBRATION)[1:]]
    picture = plots.reliability(*arrays)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 100_000
    moved = plots.reliability(*arrays[:3], 1 - arrays[3], arrays[4])
    assert moved != picture


# ---- parts joined into a probability -----------------------------------------------------------

PARTS = ("agreement", "reflection")


def planted(n, seed, missing=0.0, prompts=None):
    """Answers whose chance of being right follows a logistic law of two parts."""
    g = np.random.default_rng(seed)
    values = np.stack([g.integers(0, 6, n) / 5, g.random(n)], axis=1)
    truth = 1 / (1 + np.exp(-(-2.0 + 3.0 * values[:, 0] + 1.5 * values[:, 1])))
    lost = g.random((n, 2)) < missing
    frame = pl.DataFrame(
        {
            "prompt_id": [f"p{i % (prompts or n):04d}" for i in range(n)],
            "right": g.random(n) < truth,
            **{
                name: [
                    None if gone else v for v, gone in zip(values[:, j], lost[:, j], strict=True)
                ]
                for j, name in enumerate(PARTS)
            },
        }
    )
    return frame, truth


def test_the_probability_is_scikit_learns_on_the_rows_that_have_the_parts():
    known, _ = planted(300, 0, missing=0.2)
    rows, _ = planted(50, 1, missing=0.3)
    found = Joint(known, PARTS, 0, resamples=2).probability(rows)
    for names in ((*PARTS,), ("agreement",), ("reflection",)):
        has = [known[p].is_not_null() for p in names]
        mine = known.filter(*has)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10))
        model.fit(mine.select(names).to_numpy(), mine["right"].to_numpy())
        there = np.stack([rows[p].is_not_null().to_numpy() for p in PARTS], axis=1)
        at = (there == [p in names for p in PARTS]).all(axis=1)
        assert at.any()
        expected = model.predict_proba(rows.filter(at).select(names).to_numpy())[:, 1]
        np.testing.assert_allclose(found[at], expected, atol=1e-4)
    neither = np.isnan(found)
    assert neither.sum() == rows.filter(*(pl.col(p).is_null() for p in PARTS)).height > 0


def test_the_true_probability_lies_in_its_interval():
    rows, truth = planted(200, 99)
    covered, means = [], []
    for seed in range(12):
        known, _ = planted(240, seed)
        joint = Joint(known, PARTS, seed, resamples=100)
        low, high = joint.interval(rows)
        covered.append(((low <= truth) & (truth <= high)).mean())
        means.append(joint.probability(rows))
        assert (low <= means[-1]).all()
        assert (means[-1] <= high).all()
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.abs(np.mean(means, axis=0) - truth).max() < 0.08


def test_equal_draws_of_a_prompt_widen_the_interval_and_not_the_number_of_prompts():
    known, _ = planted(200, 3)
    rows, _ = planted(20, 4)
    thrice = pl.concat([known] * 3)
    one, many = (Joint(k, PARTS, 0, resamples=60) for k in (known, thrice))
    width = [np.subtract(*reversed(joint.interval(rows))).mean() for joint in (one, many)]
    # Copies say nothing new; taken for new rows they would narrow it by sqrt(3) to 0.58.
    assert width[1] > 0.9 * width[0]
    assert too_few(known[:30]) == too_few(pl.concat([known[:30]] * 3))


def test_expected_shares_are_those_of_the_planted_truth():
    known, _ = planted(2000, 5)
    rows, _ = planted(20_000, 6)
    joint = Joint(known, PARTS, 0, resamples=40)
    found = joint.expected(rows, 0.4)
    kept, right = joint.probability(rows) >= 0.4, rows["right"].to_numpy()
    told = {
        "wrong_before": (~right).mean(),
        "wrong_kept": (~right[kept]).mean(),
        "right_lost": right[~kept].sum() / right.sum(),
    }
    for name, value in told.items():
        line = found[name]
        assert line["low"] <= line["value"] <= line["high"]
        assert line["low"] - 0.01 <= value <= line["high"] + 0.01, name
    assert found["wrong_kept"]["value"] < found["wrong_before"]["value"]
    nothing = joint.expected(rows, 1.1)
    assert nothing["wrong_kept"] is None
    assert nothing["right_lost"]["value"] == 1.0


def test_order_and_cut_of_the_rows_change_no_digit():
    known, _ = planted(160, 7, missing=0.1, prompts=60)
    rows, _ = planted(90, 8, missing=0.2)
    joint, turned = (Joint(k, PARTS, 1, resamples=20) for k in (known, known.reverse()))
    whole = joint.probability(rows)
    parts = [turned.probability(rows[:31]), turned.probability(rows[31:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert joint.expected(rows, 0.5) == turned.expected(rows, 0.5)
    crossed = cross_fitted(known, PARTS, 1)
    np.testing.assert_array_equal(cross_fitted(known.reverse(), PARTS, 1)[::-1], crossed)


def test_a_prompt_is_judged_by_a_model_that_has_not_seen_it():
    known, _ = planted(200, 9)
    found = cross_fitted(known, PARTS, 0)
    # Turning one prompt's label moves the others' probabilities and never its own.
    for i in (0, 50, 199):
        right = known["right"].to_list()
        right[i] = not right[i]
        moved = cross_fitted(known.with_columns(pl.Series("right", right)), PARTS, 0)
        assert moved[i] == found[i]
        assert (moved != found).any()
    told = calibration(known.with_columns(confidence=found), PARTS)
    assert told["error"] < 0.1


def test_parts_that_too_few_known_rows_have_are_left_out_and_counted():
    known, _ = planted(200, 10)
    rare = known.with_columns(
        reflection=pl.when(pl.int_range(pl.len()) < 12).then("reflection").otherwise(None)
    )
    rows = pl.DataFrame({"agreement": [0.2, 0.2, None], "reflection": [None, 0.9, 0.9]})
    joint = Joint(rare, PARTS, 0, resamples=5)
    found = joint.probability(rows)
    assert found[0] == found[1]  # reflection says nothing here
    assert found[2] == pytest.approx((known["right"].sum() + 1) / (known.height + 2))
    assert joint.reduced == 2
    assert too_few(known) is None
    only = known.filter(pl.col("right") | (pl.int_range(pl.len()) < 9))
    assert "wrong answers, where 10 of each are needed" in too_few(only)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.6), st.integers(20, 120))
def test_a_probability_is_one_and_lies_in_its_interval_whatever_is_missing(seed, missing, n):
    known, _ = planted(n, seed, missing)
    rows, _ = planted(30, seed + 1, missing)
    joint = Joint(known, PARTS, seed, resamples=8)
    found, (low, high) = joint.probability(rows), joint.interval(rows)
    bare = rows.select(pl.all_horizontal(pl.col(p).is_null() for p in PARTS)).to_series().to_numpy()
    np.testing.assert_array_equal(np.isnan(found), bare)
    there = ~bare
    assert ((low[there] >= 0) & (low[there] <= found[there])).all()
    assert ((found[there] <= high[there]) & (high[there] <= 1)).all()
