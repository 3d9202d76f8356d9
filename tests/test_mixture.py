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
from siftline.selectors.spending import check_mixture, group_of, split
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
