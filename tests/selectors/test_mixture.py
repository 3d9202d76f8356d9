"""Mixtures: quotas against every possible split, and a budget that is spent by source."""

import dataclasses
import itertools
import json
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source
from siftline.recipe.parse import parse
from siftline.rows.schema import digest
from siftline.rows.selection import select
from siftline.selectors.baselines import BalancedRandom
from siftline.selectors.method import select as sift
from siftline.selectors.spending import Budget, check_mixture, group_of, split, tempered
from siftline.stages.allocate import run as spend
from siftline.stages.allocate.decide import COLUMNS, Allocate
from siftline.stages.context import Context
from siftline.workspace import Workspace

SMALL = st.dictionaries(
    st.sampled_from("abc*"), st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0]), min_size=1
).filter(lambda mixture: any(mixture.values()))


@given(SMALL, st.integers(0, 9), st.lists(st.integers(0, 6), min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_quotas_are_the_fairest_split_there_is(mixture, size, room):
    capacity = dict(zip("abc*", room, strict=True))
    table = split(mixture, size, capacity)
    names, quotas = table["source"].to_list(), table["quota"].to_list()
    assert names == sorted(name for name, weight in mixture.items() if weight)
    total = min(size, sum(capacity[name] for name in names))
    assert sum(quotas) == total
    assert table["share"].sum() == size
    weights = [mixture[name] for name in names]
    rooms = [min(capacity[name], total) for name in names]
    ideal = _filled_like_water(weights, rooms, total)

    def away(given):
        return sum((q - x) ** 2 for q, x in zip(given, ideal, strict=True))

    every = itertools.product(*(range(room + 1) for room in rooms))
    best = min(away(other) for other in every if sum(other) == total)
    assert away(quotas) == pytest.approx(best, abs=1e-9)
    free = split(mixture, size)
    assert free["quota"].to_list() == free["share"].to_list() == table["share"].to_list()
    exact = np.array(weights) / sum(weights) * size
    assert (np.abs(free["quota"].to_numpy() - exact) < 1).all()
    gap = (table["share"] - table["capacity"]).clip(lower_bound=0)
    assert table["shortfall"].to_list() == gap.to_list()


def _filled_like_water(weights, rooms, total):
    """Real-valued shares min(room, level x weight) that add up to the total, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        level = (low + high) / 2
        held = sum(min(r, level * w) for r, w in zip(rooms, weights, strict=True))
        low, high = (level, high) if held < total else (low, level)
    return [min(r, high * w) for r, w in zip(rooms, weights, strict=True)]


def test_what_a_small_source_lacks_goes_to_the_others_by_weight():
    table = split({"a": 0.5, "b": 0.3, "c": 0.2}, 1000, {"a": 100, "b": 5000, "c": 5000})
    assert table["share"].to_list() == [500, 300, 200]
    assert table["quota"].to_list() == [100, 540, 360]
    assert table["shortfall"].to_list() == [400, 0, 0]
    assert split({"a": 1.0, "b": 1.0}, 10, {"a": 3}).get_column("quota").to_list() == [3, 0]


def test_sources_are_grouped_by_name():
    frame = pl.DataFrame({"source": ["a", "b", "c", None]})

    def groups(mixture):
        return frame.select(group_of(mixture)).to_series().to_list()

    assert groups({"a": 1.0}) == ["a", None, None, None]
    assert groups({"a": 1.0, "*": 2.0}) == ["a", "*", "*", "*"]
    assert groups({"a": 1.0, "b": 0.0, "*": 2.0}) == ["a", None, "*", "*"]


def test_weights_that_split_nothing_are_refused():
    for bad, says in (
        ({"a": -1.0}, "mixture: the weight of 'a' is -1.0: give 0 or above"),
        ({"a": float("inf")}, "the weight of 'a' is inf"),
        ({"a": 0.0}, "mixture: no source has a weight above 0: name one"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            check_mixture(bad, "mixture")
        with pytest.raises(ValueError, match=re.escape(says)):
            Allocate(size=1, mixture=bad)


# ---- spending by source ----------------------------------------------------------------------

SOURCES = ("code", "math", "talk", "tiny")
THIRDS = ("01234", "56789a", "bcdef")


def pool(n=240, seed=0):
    g = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prompt = digest("prompt", i)[:20]
        source = SOURCES[min(int(g.integers(0, 33)) // 10, 3)]
        difficulty = float(np.round(g.random(), 2))
        rows += [
            {
                "id": prompt + digest("row", j)[:20],
                "prompt_id": prompt,
                "cluster": i % 5,
                "difficulty": difficulty,
                "n_tokens": int(g.integers(5, 60)),
                "logprob_mean": -float(g.random()),
                "verified": None,
                "origin": "pool",
                "source": source,
            }
            for j in range(int(g.integers(1, 4)))
        ]
    return pl.DataFrame(rows, schema={**COLUMNS, "source": pl.String})


def kept_of(frame, config):
    result = select(config, frame)
    return result, frame.filter(pl.col("id").is_in(result.kept.to_list()))


def test_rows_are_met_exactly_by_source():
    frame, mixture = pool(), {"math": 3.0, "talk": 1.0}
    result, kept = kept_of(frame, Allocate(size=80, unit="rows", fit="random", mixture=mixture))
    counts = dict(kept["source"].value_counts().iter_rows())
    assert counts == {"math": 60, "talk": 20}
    table = result.tables["mixture"]
    assert table["chosen"].to_list() == [60, 20]
    assert result.facts["mixture_shortfall"] == 0
    left_out = result.decisions.filter(reason="source_not_in_mixture")
    unasked = frame.filter(pl.col("source").is_in(["code", "tiny"]))
    assert set(left_out["id"]) == set(unasked["id"])


def test_tokens_are_met_within_a_row_by_source_and_the_small_one_is_taken_whole():
    frame = pool(600)
    mixture = {"tiny": 0.4, "math": 0.3, "*": 0.3}
    result, kept = kept_of(frame, Allocate(size=12_000, answers=3, mixture=mixture))
    tiny = frame.filter(source="tiny")
    assert 0 < tiny["n_tokens"].sum() < 4800
    assert set(tiny["id"]) <= set(kept["id"])
    table = {line["source"]: line for line in result.tables["mixture"].to_dicts()}
    assert table["tiny"]["chosen_tokens"] == tiny["n_tokens"].sum() == table["tiny"]["quota"]
    assert table["tiny"]["shortfall"] == 4800 - tiny["n_tokens"].sum()
    for name in ("math", "*"):
        assert abs(table[name]["chosen_tokens"] - table[name]["quota"]) < 60
        assert table[name]["quota"] > table[name]["share"] == 3600
    assert kept["n_tokens"].sum() == result.facts["spent"]
    assert 12_000 - 5 <= result.facts["spent"] <= 12_000


def test_a_mixture_that_asks_every_source_as_it_is_changes_little_else():
    """The part of a source that is the whole pool is spent as the whole pool is."""
    frame = pool().with_columns(source=pl.lit("one"))
    for unit, size in (("rows", 50), ("loss_tokens", 900)):
        plain = select(Allocate(size=size, unit=unit, answers=2), frame)
        mixed = select(Allocate(size=size, unit=unit, answers=2, mixture={"*": 4.0}), frame)
        assert mixed.decisions.equals(plain.decisions)
        assert mixed.tables["clusters"].equals(plain.tables["clusters"])
        assert mixed.tables["levels"].equals(plain.tables["levels"])


@given(SMALL, st.integers(1, 60), st.sampled_from(["rows", "loss_tokens"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_budget_holds_and_order_changes_nothing(mixture, size, unit, seed):
    names = dict(zip(SOURCES, "abcd", strict=True))
    frame = pool(40).with_columns(pl.col("source").replace(names))
    config = Allocate(size=size, unit=unit, on_shortfall="smaller", fit="random", mixture=mixture)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=seed)
    # All answers to a prompt are in one bucket, whatever the order.
    parts = [shuffled.filter(pl.col("prompt_id").str.slice(0, 1).is_in(list(k))) for k in THIRDS]
    if unit == "loss_tokens" and size < 60:
        config = dataclasses.replace(config, size=size + 60)  # the longest answer there is
        size += 60
    whole = select(config, frame)
    plan = config.decide([config.summarise(part) for part in parts])
    pieces = pl.concat([config.apply(part, plan).decisions for part in parts]).sort("id")
    assert pieces.equals(whole.decisions)
    chosen = frame.filter(pl.col("id").is_in(whole.kept.to_list()))
    spent = chosen.height if unit == "rows" else chosen["n_tokens"].sum()
    assert spent <= size
    asked = {name for name, weight in mixture.items() if weight}
    assert set(chosen["source"]) <= ({*"abcd"} - mixture.keys()) | asked
    if "*" not in asked:
        assert set(chosen["source"]) <= asked


def test_the_stage_hands_the_sources_on(tmp_path, monkeypatch):
    columns = {"question": "q", "response": "r", "source": "s"}
    lines = [{"q": f"What is {i}?", "r": f"It is {i}.", "s": "abc"[i % 3]} for i in range(30)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    workspace = Workspace(tmp_path / "root")
    source = Source(path=str(tmp_path / "p.jsonl"), columns=columns)
    build_pool(workspace.pool("p"), PoolSpec(name="p", inputs=(source,), buckets=2))
    recipe = parse(
        {
            "name": "r",
            "pool": {"name": "p", "inputs": [{"path": "x.jsonl"}], "buckets": 2},
            "models": {"m": {"path": str(tmp_path)}},
            "stages": [{"allocate": {"mixture": {"a": 1, "*": 3, "c": 0}}}],
            "budget": {"size": 12, "unit": "rows"},
        }
    )

    def scored(context):
        ids = [context.in_play(bucket) for bucket in context.buckets]
        known = {"n_tokens": 5, "logprob_mean": -1.0}
        return [pl.DataFrame([{"id": i, **known} for i in of]) for of in ids], {}

    monkeypatch.setattr(spend, "likelihoods", scored)
    monkeypatch.setattr(spend, "identity", lambda spec: spec.path)
    pool = Pool(workspace.pool("p"))
    stage = recipe.stage("allocate")
    run = spend.run(Context(workspace, recipe, stage, pool, [], None, lambda line: None))
    table = run.tables["mixture"].select("source", "quota", "capacity", "chosen").rows()
    assert table == [("*", 9, 10, 9), ("a", 3, 10, 3)]


# ---- temperature and caps --------------------------------------------------------------------


def outcome(decide, *given_, says):
    """What is selected, or None where nothing fits and the error says so."""
    try:
        return decide(*given_)
    except ValueError as error:
        if not re.search(says, str(error)):
            raise
        return None


def by_group(found, table):
    return dict(
        found.decisions.filter("kept")
        .join(table.select("id", "source"), on="id")["source"]
        .value_counts()
        .iter_rows()
    )


@given(
    st.lists(st.floats(0.01, 1e6), min_size=1, max_size=6),
    st.floats(0.2, 50),
)
@settings(max_examples=80, deadline=None)
def test_a_temperature_is_a_power_and_keeps_the_order(weights, temperature):
    found = tempered(np.array(weights), temperature)
    logs = np.log(np.array(weights)) / temperature
    np.testing.assert_allclose(np.log(found), logs - logs.max(), atol=1e-9)
    assert (np.argsort(found, kind="stable") == np.argsort(weights, kind="stable")).all() or len(
        set(found)
    ) < len(found)
    assert tempered(np.array([0.0, 4.0]), temperature).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("temperature", "rows"), [(1.0, (70, 20)), (2.0, (59, 31)), (1e6, (45, 45))]
)
def test_a_budget_by_temperature_is_that_of_the_formula(temperature, rows):
    """900 rows of one source and 250 of another; by hand: 90 split by 900^(1/T) and 250^(1/T)."""
    names = ["big"] * 900 + ["small"] * 250
    table = pl.DataFrame(
        {
            "id": [digest("r", i) for i in range(1150)],
            "prompt_id": [digest("p", i)[:20] for i in range(1150)],
            "source": names,
            "cluster": 0, "difficulty": 0.5, "n_tokens": 3, "logprob_mean": -1.0,
            "verified": True, "origin": "pool",
        }
    )  # fmt: skip
    given_ = select(Allocate(size=90, unit="rows", temperature=temperature), table)
    expected = dict(zip(("big", "small"), rows, strict=True))
    if temperature == 1.0:  # nothing is asked by source, so shares are only near
        assert given_.facts["rows"] == 90
        return
    assert by_group(given_, table) == expected
    ours = sift(BalancedRandom(temperature=temperature), table, Budget(90))
    assert by_group(ours, table) == expected


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from(["rows", "loss_tokens"]),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_no_source_has_more_than_its_cap_in_any_unit(cap, size, unit, seed):
    table = pool(90, seed)
    amount = pl.len() if unit == "rows" else pl.col("n_tokens").sum()
    config = Allocate(
        size=size * (1 if unit == "rows" else 10), unit=unit, on_shortfall="smaller", answers=3,
        caps={"code": cap, "*": 2 * cap}, seed=seed,
    )  # fmt: skip
    found = outcome(select, config, table, says="below the (shortest|first) answer")
    if found is None:
        return
    kept = table.join(found.decisions.filter("kept").select("id"), on="id")
    spent = dict(kept.group_by("source").agg(amount).iter_rows())
    for name, had in spent.items():
        assert had <= (cap if name == "code" else 2 * cap)
    again = select(config, table.sample(fraction=1.0, shuffle=True, seed=seed))
    assert again.decisions.equals(found.decisions)
    reasons = dict(found.decisions["reason"].drop_nulls().value_counts().iter_rows())
    assert reasons.get("over_source_cap", 0) == found.facts["over_source_cap"]
    ours = BalancedRandom(cap=cap, seed=seed)
    budget = Budget(config.size, unit, "smaller")
    drawn = outcome(sift, ours, table, budget, says="buys nothing")
    if drawn is None:
        return
    held = table.join(drawn.decisions.filter("kept").select("id"), on="id")
    assert all(n <= cap for n in held.group_by("source").agg(amount).to_series(1))


def test_what_a_cap_takes_away_goes_to_the_others_and_what_is_short_is_told():
    table = pool(240).filter(pl.col("source") != "tiny")
    config = {"unit": "rows", "answers": 3, "mixture": {"code": 8, "math": 1, "talk": 1}}
    free = by_group(select(Allocate(size=30, **config), table), table)
    assert free == {"code": 24, "math": 3, "talk": 3}
    capped = select(Allocate(size=30, caps={"code": 6}, **config), table)
    assert by_group(capped, table) == {"code": 6, "math": 12, "talk": 12}
    assert capped.tables["mixture"]["shortfall"].to_list() == [18, 0, 0]
    with pytest.raises(ValueError, match="short by 12"):
        select(Allocate(size=30, caps={"*": 6}, **config), table)


def test_caps_and_temperatures_that_mean_nothing_are_refused():
    for bad, says in (
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"caps": {"a": 0}}, "that of 'a' is 0"),
        ({"caps": {"b": 3}, "mixture": {"a": 1.0}}, "'b' has no weight in mixture"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Allocate(size=1, **bad)
    with pytest.raises(ValueError, match="temperature is 0"):
        BalancedRandom(temperature=0.0)
    with pytest.raises(ValueError, match="is 0: give 1 or more"):
        BalancedRandom(cap=0)
