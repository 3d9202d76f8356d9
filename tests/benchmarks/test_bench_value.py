"""The arms of benchmarks/bench_value.py, and that a failed or shared cell is handled once."""

import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest

from siftline.recipe.parse import parse
from siftline.selectors.baselines import Length

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"prompts": 20, "test": 5, "dev": 5, "target": 5, "corpus": 50}


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import value_arms

    return value_arms


@pytest.fixture
def bench(arms):
    import bench_value

    return bench_value


def test_every_arm_is_a_recipe_that_parses(arms, bench):
    data = arms.recipe_data(*bench.SIZES["large"])
    assert data["models"]["base"]["pretrain"]["hidden"] == 256
    assert data["budget"]["size"] == 50_000
    for each in (*arms.variants(data).values(), arms.selecting(data, "less", 0)):
        parse(each)
    sampling = parse(arms.vanilla(data, 7)).stage("rejection_sampling").options
    assert (sampling.target, sampling.k) == ("vanilla", 7)
    found = parse(arms.of_source(data, "b"))
    assert [s.kind for s in found.stages] == [
        "duplicates", "decontamination", "verify", "allocate",
    ]  # fmt: skip
    allocate = found.stages[-1].options
    assert (allocate.mixture, allocate.fit, allocate.answers) == ({"b": 1.0}, "random", 1)


def test_the_strongest_source_is_right_most_often_where_that_can_be_told(arms, monkeypatch):
    decisions = pl.DataFrame(
        {
            "id": ["a1", "a2", "b1", "b2", "b3", "c1", "c2"],
            "outcome": ["kept", "removed", "kept", "kept", "removed", "kept", "kept"],
            # c1 and c2 have nothing to be held against; a2 has no final answer
            "value": [1.0, None, 1.0, 1.0, 0.0, None, None],
        }
    )
    sources = pa.table({"id": decisions["id"].to_list(), "source": list("aabbbcc")})
    facts = {"draws": 50, "prompts": 20}
    done = [
        (SimpleNamespace(kind="verify"), SimpleNamespace(all_decisions=lambda: decisions)),
        (SimpleNamespace(kind="rejection_sampling"), SimpleNamespace(facts=facts)),
    ]
    monkeypatch.setattr(arms, "outputs", lambda workspace, recipe: done)
    monkeypatch.setattr(arms, "Pool", lambda path: SimpleNamespace(all_rows=lambda names: sources))
    world = object.__new__(arms.World)
    world.recipe = SimpleNamespace(pool=SimpleNamespace(name="p"))
    world.workspace = SimpleNamespace(pool=lambda name: name)
    assert world.strongest() == "b"
    assert world.draws_per_prompt() == 2


def test_methods_of_ones_own_are_arms_of_every_size(arms, bench, monkeypatch):
    module = ModuleType("own_arm")
    module.Mine = type("Mine", (Length,), {"__module__": "own_arm", "needs": ("scores",)})
    monkeypatch.setitem(sys.modules, "own_arm", module)
    world = SimpleNamespace(data=arms.recipe_data(SIZES, 100))
    small, _ = bench.arms_of(world, "small", ["own_arm:Mine"])
    assert small[-1] == "select own_arm:Mine"
    assert small[-2] == "chain without rejection_sampling"
    whole, left_out = bench.arms_of(world, "whole", ["own_arm:Mine"])
    assert whole[-1] == "select own_arm:Mine"
    assert {arms.VANILLA, arms.STRONGEST, "select random", *small} <= set(whole)
    assert list(left_out) == ["linear_rule", "deita"]


def test_arms_of_the_same_rows_share_a_training(bench):
    asked = []

    def submit(rows, name, seed):
        asked.append((name, seed))
        return Future()

    cells = bench.Cells(submit)
    rows = pa.table({"id": ["x", "y"]})
    first = cells.of(rows, "one", 0)
    assert cells.of(rows.take([1, 0]), "two", 0) is first
    assert cells.of(rows, "two", 1) is not first
    assert cells.of(rows.slice(0, 1), "three", 0) is not first
    assert cells.of(None, "zero-shot", 0) is not first
    assert asked == [("one", 0), ("two", 1), ("three", 0), ("zero-shot", 0)]
    cells.check()
    first.set_exception(ValueError("no such rows"))
    with pytest.raises(ValueError, match="no such rows"):
        cells.check()


def test_a_failure_drops_what_waits(bench):
    waiting = []

    def table():
        with bench.workers(1) as pool:
            failed = pool.submit(int, "x")
            waiting.extend(pool.submit(time.sleep, 0.5) for _ in range(20))
            failed.result()

    with pytest.raises(ValueError, match="base 10"):
        table()
    assert all(cell.done() for cell in waiting)
    assert sum(cell.cancelled() for cell in waiting) >= 15
