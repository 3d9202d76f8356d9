"""What holds for every registered method: budgets, invariance, ties, and the table of methods."""

import dataclasses
import sys
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.config import build
from siftline.rows.schema import digest
from siftline.rows.selection import DECISION
from siftline.selectors import registry as own
from siftline.selectors.method import select
from siftline.selectors.registry import METHODS, find
from siftline.selectors.spending import Budget, spend, spend_by_group

WORDS = ["river", "stone", "moon", "apple", "logic", "verb", "sum", "proof", "quick", "lazy"]
SMALL = {
    "simcore": {"stop": False, "clusters": 3},
    "best_fit": {"singles": "keep", "answers": 9},
    "facility_location": {"cover": 60},
    "kmeans_quality": {"clusters": 5},
    "got_d": {"tolerance": 0.05},
    "dsir": {"scale": "mean"},
}
NAMES = [entry.name for entry in METHODS if "training" not in entry.needs]
"""Those that decide by themselves; the other trains models, see test_refining.py."""
HASHED = ["random", "balanced_random", "dsir", "best_fit"]


def frame(n, seed=0, dtype=pl.Float16, d=8, prefix="row"):
    """Rows with everything a method can ask for; every tenth row repeats the one before it."""
    g = np.random.default_rng(seed)
    x = g.normal(size=(6, d))[g.integers(0, 6, n)] + 0.6 * g.normal(size=(n, d))
    numbers = g.random((5, n))
    texts = [" ".join(g.choice(WORDS, 4 + i % 5)) for i in range(n)]
    sources = g.choice(["one", "two", "three"], n, p=[0.7, 0.2, 0.1])
    for i in range(9, n, 10):
        x[i], numbers[:, i], texts[i], sources[i] = x[i - 1], numbers[:, i - 1], texts[i - 1], "one"
    embedding = pl.Series("embedding", x.astype(np.float32), dtype=pl.Array(pl.Float32, d))
    return pl.DataFrame(
        {
            "id": [digest(prefix, i) for i in range(n)],
            "prompt_id": [digest(prefix, i // 3)[:20] for i in range(n)],
            "source": sources,
            "text": texts,
            "n_tokens": g.integers(1, 40, n),
            "perplexity": 1 + 9 * numbers[0],
            "ifd_loss_ratio": 0.2 + 0.7 * numbers[1],
            "logprob_mean": -numbers[2],
            "logprob_mean_warm": -numbers[2] * (0.2 + numbers[4]),
            "complexity": numbers[3],
            "quality": numbers[4],
            "reward": 5 * numbers[0],
            "understandability": numbers[1],
            "naturalness": numbers[2],
            "coherence": numbers[3],
        },
        schema_overrides={"n_tokens": pl.Int64},
    ).with_columns(embedding.cast(pl.Array(dtype, d)))


def made(name, **more):
    return find(name).method(**{**SMALL.get(name, {}), **more})


def outcome(selection):
    return selection.decisions.join(selection.tables["ranks"], on="id").sort("id")


TARGET = frame(7, seed=5, prefix="target")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None)
@given(st.integers(10, 60), st.floats(0.05, 0.9), st.integers(0, 1000))
def test_rows_are_met_exactly_and_every_row_is_accounted_for(name, n, share, seed):
    pool = frame(n, seed % 7)
    size = max(1, int(share * n))
    if name == "deita":
        size = min(size, 6)  # more are not different enough
    found = outcome(select(made(name), pool, Budget(size), TARGET))
    assert found["kept"].sum() == size
    assert found["id"].to_list() == sorted(pool["id"])
    assert found.filter(~pl.col("kept"))["reason"].null_count() == 0
    assert found.filter("kept")["reason"].is_null().all()
    ranks = found["rank"].drop_nulls().to_list()
    assert sorted(ranks) == list(range(1, len(ranks) + 1))
    assert sorted(found.filter("kept")["rank"]) == list(range(1, size + 1))


@pytest.mark.parametrize("name", NAMES)
def test_order_and_buckets_of_rows_change_no_byte(name):
    pool = frame(80)
    method, budget = made(name), Budget(7)
    whole = select(method, pool, budget, TARGET)
    shuffled = pool.sample(fraction=1, shuffle=True, seed=3)
    parts = [shuffled[:11], shuffled[11:60], shuffled[60:]]
    plan = method.decide([method.summarise(part) for part in parts], budget, TARGET.reverse())
    pieces = [outcome(method.apply(part, plan)) for part in parts]
    assert pl.concat(pieces).sort("id").equals(outcome(whole))
    assert plan.facts == whole.facts
    for key, table in whole.tables.items():
        if key != "ranks":
            assert table.equals(plan.tables[key])


@pytest.mark.parametrize("name", NAMES)
def test_loss_tokens_are_spent_but_never_exceeded(name):
    pool = frame(90, seed=1)
    selection = select(made(name), pool, Budget(180, "loss_tokens"), TARGET)
    kept = pool.filter(pl.col("id").is_in(selection.kept.to_list()))["n_tokens"].to_list()
    assert sum(kept) == selection.facts["spent"] <= 180
    assert 180 - sum(kept) < 40  # less than the longest row is left


@pytest.mark.parametrize("name", NAMES)
def test_too_large_a_budget_is_an_error_or_everything_there_is(name):
    pool = frame(30)
    with pytest.raises(ValueError, match=r"budget is 500 rows.*on_shortfall to smaller"):
        select(made(name), pool, Budget(500), TARGET)
    smaller = select(made(name), pool, Budget(500, on_shortfall="smaller"), TARGET)
    assert smaller.facts["shortfall"] == 500 - len(smaller.kept)
    assert smaller.vacuous == (len(smaller.kept) == 30)
    assert smaller.vacuous or name == "deita"
    with pytest.raises(ValueError, match="no rows to select from"):
        select(made(name), pool[:0], Budget(5), TARGET)


@pytest.mark.parametrize("name", NAMES)
def test_an_id_that_comes_twice_and_a_missing_target_are_refused(name):
    pool = frame(12)
    with pytest.raises(ValueError, match="comes twice"):
        select(made(name), pl.concat([pool, pool[:1]]), Budget(2), TARGET)
    if any(need != "target warm-up" for need in find(name).needs if need.startswith("target")):
        for nothing in (None, TARGET[:0]):
            with pytest.raises(ValueError, match="target set is empty"):
                select(made(name), pool, Budget(2), nothing)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if {"embeddings", "gradients"} & set(find(n).needs)]
)
def test_bad_embeddings_are_refused_with_the_row(name):
    pool = frame(12)
    vectors = pool["embedding"].to_numpy().astype(np.float32).copy()
    vectors[4, 2] = np.nan
    bad = pool.with_columns(pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, 8)))
    first = bad["id"][4]
    with pytest.raises(ValueError, match=f"NaN or infinity, first {first}: embed it again"):
        select(made(name), bad, Budget(2), TARGET)
    lists = pool.with_columns(pl.col("embedding").cast(pl.List(pl.Float32)))
    with pytest.raises(ValueError, match="store fixed-size lists"):
        select(made(name), lists, Budget(2), TARGET)
    missing = pool.with_columns(
        pl.when(pl.col("id") != first).then(pl.col("embedding")).alias("embedding")
    )
    with pytest.raises(ValueError, match=f"1 of 12 rows have no embedding, first {first}"):
        select(made(name), missing, Budget(2), TARGET)
    if find(name).targeted:
        with pytest.raises(ValueError, match="8 dimensions in the pool and 5 in the target"):
            select(made(name), pool, Budget(2), frame(3, d=5, prefix="target"))


@pytest.mark.parametrize("name", [e.name for e in METHODS if "scores" in e.needs])
def test_missing_scores_are_refused_with_the_remedy(name):
    pool = frame(12)
    method = made(name)
    (column, *_) = find(name).needed_columns(method) or ("n_tokens",)
    first = pool["id"][7]
    holed = pool.with_columns(pl.when(pl.col("id") != first).then(pl.col(column)).alias(column))
    with pytest.raises(ValueError, match=f"no {column}.*, first {first}: score"):
        select(method, holed, Budget(2), TARGET)
    with pytest.raises(ValueError, match=f"no column '{column}': score every row"):
        select(method, pool.drop(column), Budget(2), TARGET)


@pytest.mark.parametrize("name", HASHED)
def test_one_percent_more_rows_change_about_one_percent(name):
    pool = frame(3030, seed=2)
    method = made(name)
    before = set(select(method, pool[:3000], Budget(600), TARGET).kept)
    after = set(select(method, pool, Budget(606), TARGET).kept)
    assert len(before - after) / 600 < 0.025


@pytest.mark.parametrize("name", [*HASHED, "kmeans_quality", "facility_location"])
def test_another_seed_draws_others(name):
    pool = frame(300)
    first, second = (set(select(made(name, seed=s), pool, Budget(60), TARGET).kept) for s in (0, 1))
    assert len(first & second) < 50


@pytest.mark.parametrize(
    "name", ["random", "balanced_random", "dsir", "best_fit", "kmeans_quality"]
)
def test_equal_duplicates_are_drawn_equally_often(name):
    pool = frame(30, seed=3)
    twins = pool[0:1]
    pool = pl.concat([pool, twins.with_columns(id=pl.lit("f" * 40))])
    pool = pool.with_columns(prompt_id=pl.col("id").str.head(20))
    counts = np.zeros(2)
    for seed in range(60):
        more = {"clusters": 1} if name == "kmeans_quality" else {}
        kept = set(select(made(name, seed=seed, **more), pool, Budget(10), TARGET).kept)
        counts += [twins["id"][0] in kept, "f" * 40 in kept]
    assert counts.min() > 3
    assert abs(counts[0] - counts[1]) < 3.3 * np.sqrt(counts.sum())


@pytest.mark.parametrize(
    "name",
    [
        "length",
        "perplexity",
        "ifd",
        "linear_rule",
        "loss_drop",
        "got_d",
        "best_fit",
        "deita",
        "dsir",
    ],
)
def test_equal_duplicates_have_equal_values(name):
    pool = frame(50, seed=4)
    pool = pool.with_columns(
        n_tokens=pl.when(pl.int_range(pl.len()) % 10 == 9)
        .then(pl.col("n_tokens").shift(1))
        .otherwise("n_tokens")
    )
    smaller = Budget(50, on_shortfall="smaller")
    more = {"similarity": 1.0} if name == "deita" else {}
    found = outcome(select(made(name, **more), pool, smaller, TARGET))
    value = dict(found.select("id", "value").iter_rows())
    ids = pool["id"].to_list()
    for i in range(9, 50, 10):
        assert value[ids[i]] == value[ids[i - 1]]


@pytest.mark.parametrize(
    "name",
    ["length", "perplexity", "ifd", "linear_rule", "loss_drop", "random", "got_d", "rds_plus"],
)
def test_a_larger_budget_keeps_what_a_smaller_one_kept(name):
    pool = frame(60)
    kept = [set(select(made(name), pool, Budget(k), TARGET).kept) for k in (5, 20, 21, 55)]
    assert kept[0] < kept[1] < kept[2] < kept[3]


@pytest.mark.parametrize(
    ("name", "column", "up"),
    [
        ("length", "n_tokens", 100.0),
        ("perplexity", "perplexity", 100.0),
        ("ifd", "ifd_loss_ratio", 0.99),
        ("deita", "quality", 9.0),
    ],
)
def test_a_better_score_brings_a_row_in(name, column, up):
    pool = frame(40)
    selection = select(made(name), pool, Budget(5), TARGET)
    lost = selection.removed["id"][0]
    better = pool.with_columns(
        pl.when(pl.col("id") == lost).then(up).otherwise(pl.col(column)).alias(column)
    )
    assert lost in set(select(made(name), better, Budget(5), TARGET).kept)


def test_a_budget_checks_itself():
    for bad, match in (
        ({"size": 0}, "budget is 0"),
        ({"size": 1, "unit": "bytes"}, "unit is 'bytes'"),
        ({"size": 1, "on_shortfall": "shrug"}, "on_shortfall is 'shrug'"),
    ):
        with pytest.raises(ValueError, match=match):
            Budget(**bad)
    pool = frame(10).with_columns(n_tokens=pl.lit(9))
    with pytest.raises(ValueError, match="buys nothing, the shortest row"):
        select(made("random"), pool, Budget(3, "loss_tokens"))
    with pytest.raises(ValueError, match="needs n_tokens of every row"):
        select(made("random"), frame(10).drop("n_tokens"), Budget(3, "loss_tokens"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 300))
def test_spending_tokens_leaves_no_room_for_a_row_that_waits(costs, size):
    amounts = np.array(costs)
    spent = spend(np.arange(len(costs)), amounts, Budget(size, "loss_tokens"))
    assert spent.amount == amounts[spent.rows].sum() <= size
    left = np.delete(amounts, spent.rows)
    assert not len(left) or left.min() > size - spent.amount
    assert (np.diff(spent.rows) > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=50), st.integers(1, 60), st.integers(0, 99))
def test_groups_share_a_budget_within_one_row(labels, size, seed):
    groups = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(groups)
    keys = np.random.default_rng(seed).random(len(groups))
    found = spend_by_group(
        groups, keys, counts.astype(float), np.ones(len(groups), int), Budget(size)
    )
    taken = np.bincount(groups[found.spent.rows], minlength=len(counts))
    assert taken.tolist() == found.quotas.tolist()
    assert taken.sum() == min(size, len(groups))
    fair = counts * min(size, len(groups)) / len(groups)
    assert (np.abs(taken - fair) < 1).all()
    for group in range(len(counts)):
        own = keys[groups == group]
        mine = keys[[i for i in found.spent.rows if groups[i] == group]]
        assert sorted(mine, reverse=True) == sorted(own, reverse=True)[: taken[group]]


def test_the_table_says_what_it_should():
    assert len({entry.name for entry in METHODS}) == len(METHODS) == len(NAMES) + 1 == 18
    for entry in METHODS:
        assert entry.method.__dataclass_params__.frozen
        assert entry.limit >= 100_000
        assert entry.good_for.endswith(".")
        assert entry.warning.endswith(".")
        options = entry.options()
        build(entry.method, options, entry.name)
        document = entry.method.__doc__
        assert all(f"{option}: " in document for option in options), entry.name
        wide = bool({"embeddings", "text", "gradients"} & set(entry.needs))
        assert entry.scope == ("global" if wide else "bucketed")


def test_a_pool_over_the_limit_is_refused(monkeypatch):
    from siftline.selectors import lexical
    from siftline.selectors import method as vectors
    from siftline.selectors.baselines import Random

    monkeypatch.setattr(Random, "MAX", 5)
    with pytest.raises(ValueError, match="6 rows, and this method takes 5 at most"):
        select(Random(), frame(6), Budget(2))
    monkeypatch.setattr(vectors, "MAX_VALUES", 40)
    with pytest.raises(ValueError, match="6 rows x 8 dimensions is over 40 values: draw a part"):
        select(made("rds_plus"), frame(6), Budget(2), TARGET)
    monkeypatch.setattr(lexical, "MAX_ROWS", 5)
    with pytest.raises(ValueError, match="takes 5 at most"):
        select(made("dsir"), frame(6), Budget(2), TARGET)
    with pytest.raises(ValueError, match=r"set cover lower \(400\)"):
        made("facility_location", cover=10**9, exact=True)._check(1_000_000)


@dataclasses.dataclass(frozen=True)
class Shortest:
    """Takes the rows with the fewest tokens."""

    needs = ("scores",)
    shift: int = 0

    def summarise(self, bucket):
        return bucket.select("id", "n_tokens")

    def decide(self, states, budget, target=None):
        return pl.concat(states).sort("n_tokens", "id").head(budget.size)

    def apply(self, bucket, plan):
        from siftline.rows.selection import Selection, decisions

        kept = bucket["id"].is_in(plan["id"].to_list())
        return Selection(decisions(bucket["id"], kept=kept, reason=["long"] * bucket.height))


def test_a_method_of_ones_own_joins_by_import_path(monkeypatch):
    module = ModuleType("my_methods")
    module.Shortest, module.half = Shortest, lambda: None
    module.Loose = type("Loose", (), dict.fromkeys(own.STEPS, lambda self: None))
    monkeypatch.setitem(sys.modules, "my_methods", module)
    entry = find("my_methods:Shortest")
    assert (entry.needs, entry.good_for) == (("scores",), "Takes the rows with the fewest tokens.")
    assert entry.options() == {"shift": 0}
    pool = frame(20)
    selection = select(entry.method(), pool, Budget(4))
    assert sorted(selection.kept) == sorted(pool.sort("n_tokens", "id")["id"][:4])
    assert dict(selection.decisions.schema) == DECISION
    for name, match in (
        ("my_methods:Nothing", "has no attribute 'Nothing'; give package.module:Class"),
        ("no_such_module:A", "No module named"),
        ("my_methods:half", "has no summarise, decide, apply"),
        ("my_methods:Loose", "is no frozen dataclass"),
        ("kmean_quality", "did you mean 'kmeans_quality'"),
        ("quux", "known: balanced_random"),
    ):
        with pytest.raises(ValueError, match=match):
            find(name)
