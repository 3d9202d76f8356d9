"""Calibration: against scikit-learn and plain loops, and on planted confidence."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from siftline.report import plots
from siftline.report.page import CALIBRATION, Report, render
from siftline.stages.confidence.calibration import (
    SHOWN_GROUPS,
    calibration,
    calibration_error,
    kept_by,
    ranking,
    reliability,
    shown,
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
