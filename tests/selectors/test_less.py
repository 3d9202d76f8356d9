"""Selection by gradient features: by hand, planted, and from files and recipes on a tiny model."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.cli import main
from siftline.config import build
from siftline.kernels.draws import uniforms
from siftline.kernels.vectors.blocks import unit
from siftline.recipe.parse import parse
from siftline.rows.ledger import KEPT
from siftline.rows.schema import digest
from siftline.selectors.less import Gradients, Less
from siftline.selectors.method import select
from siftline.selectors.spending import Budget
from siftline.stages.run import models_used, run_stage, sets_used
from siftline.stages.select.gradients import warm_share
from siftline.stages.select.options import Select
from siftline.workspace import Workspace


def frame(vectors, prefix="row", **columns):
    x = unit(np.asarray(vectors, dtype=np.float32))
    embedding = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, x.shape[1]))
    ids = sorted(digest(prefix, i) for i in range(len(x)))
    return pl.DataFrame({"id": ids, **columns}).with_columns(embedding)


def values(selection):
    lines = selection.decisions.sort("id")
    return lines["value"].to_numpy()


# ---- the selection -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_a_value_is_the_best_tasks_mean_cosine(n, m, tasks, seed):
    g = np.random.default_rng(seed)
    pool = frame(g.normal(size=(n, 5)))
    names = g.integers(0, tasks, m)
    sources = [None if k == 0 else f"task {k}" for k in names]
    target = frame(g.normal(size=(m, 5)), "target", source=pl.Series(sources, dtype=pl.String))
    x, y = (t["embedding"].to_numpy().astype(np.float64) for t in (pool, target))
    by_task = np.stack([(x @ y[names == k].T).mean(axis=1) for k in np.unique(names)])
    budget = Budget(max(1, n // 3))
    found = select(Less(), pool, budget, target)
    np.testing.assert_allclose(values(found), by_task.max(axis=0), atol=1e-6)
    best = np.argsort(-by_task.max(axis=0), kind="stable")[: budget.size]
    if np.unique(by_task.max(axis=0).round(6)).size == n:
        assert set(found.kept) == {pool["id"][int(i)] for i in best}
    assert found.facts["tasks"] == len(by_task)
    together = select(Less(tasks="all"), pool, budget, target)
    np.testing.assert_allclose(values(together), (x @ y.T).mean(axis=1), atol=1e-6)


def test_a_row_like_the_target_counts_one_and_comes_first():
    g = np.random.default_rng(0)
    aim = g.normal(size=(2, 16))
    target = frame(aim, "target", source=["a", "b"])
    x = np.concatenate([g.normal(size=(20, 16)), aim[1:]])
    pool = frame(x)
    found = select(Less(), pool, Budget(1), target)
    assert found.kept.to_list() == [pool["id"][20]]
    assert values(found).max() == pytest.approx(1, abs=1e-6)
    picks = found.tables["picks"]
    assert picks["task"].to_list() == ["b"]
    assert picks["score"][0] == pytest.approx(1, abs=1e-6)


def test_checkpoints_side_by_side_are_a_weighted_sum_of_cosines():
    g = np.random.default_rng(1)
    weights = np.array([0.5, 0.3, 0.2])

    def made(n):
        parts = [unit(g.normal(size=(n, 7)).astype(np.float32)) for _ in weights]
        return parts, np.concatenate([p * w**0.5 for p, w in zip(parts, weights, strict=True)], 1)

    (x, joined), (y, aims) = made(12), made(4)
    found = select(Less(tasks="all"), frame(joined), Budget(3), frame(aims, "target"))
    sums = sum(w * (a @ b.T).mean(axis=1) for w, a, b in zip(weights, x, y, strict=True))
    np.testing.assert_allclose(values(found), sums, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 30), st.integers(1, 5), st.integers(0, 999))
def test_scored_part_by_part_it_decides_the_same(n, parts, seed):
    g = np.random.default_rng(seed)
    pool = frame(g.normal(size=(n, 6)), n_tokens=g.integers(1, 9, n))
    target = frame(g.normal(size=(5, 6)), "target", source=["a", "b", "a", None, "b"])
    method, budget = Less(), Budget(9, "loss_tokens", "smaller")
    whole = select(method, pool, budget, target)
    cuts = [pool[start::parts] for start in range(min(parts, n))]
    states = [method.score(part, target) for part in cuts]
    assert all(s.columns == ["id", "n_tokens", "value", "task"] for s in states)
    mixed = [method.summarise(cuts[0]), *states[1:], method.summarise(pool[:0])]
    for given_states in (states, mixed):
        plan = method.decide(given_states, budget, target)
        found = method.apply(pool, plan)
        assert found.decisions.equals(whole.decisions)
        assert found.facts == whole.facts
        assert found.tables["picks"].equals(whole.tables["picks"])


def test_options_check_themselves():
    with pytest.raises(ValueError, match="tasks is 'prompt'"):
        Less(tasks="prompt")
    with pytest.raises(ValueError, match="random reads no gradients: leave gradients out"):
        Select("random", gradients=Gradients())
    stage = build(Select, {"method": "less", "gradients": {"dimensions": 64}}, "select")
    assert stage.gradients.dimensions == 64
    assert (stage.differentiates, stage.embeds, stage.trains) == (True, False, False)


def test_a_warm_up_draws_a_share_that_more_rows_hardly_move():
    ids = [digest("w", i) for i in range(1000)]
    drawn = warm_share(ids, 0.05, 0)
    assert len(drawn) == 50
    assert warm_share(ids[::-1], 0.05, 0) == drawn != warm_share(ids, 0.05, 1)
    more = warm_share([*ids, *(digest("v", i) for i in range(10))], 0.05, 0)
    assert len(drawn - more) <= 2
    assert not warm_share(ids, 0.0, 0)
    assert len(warm_share(ids[:100], 0.07, 0)) == 7  # the product is a last bit above
    assert len(warm_share(ids[:100], 0.071, 0)) == 8
    u = dict(zip(ids, uniforms(0, "less warm-up", ids), strict=True))
    assert min(u[i] for i in drawn) > max(u[i] for i in ids if i not in drawn)


# ---- files ---------------------------------------------------------------------------------------

WORDS = {"sums": "It is {}.", "colours": "blue red green {}"}


def write(path, kind, numbers):
    lines = [{"prompt": f"{i}+{i}?", "completion": WORDS[kind].format(2 * i)} for i in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def call(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("siftline.cli.select_run.BUCKETS", 2)

    def run(verb, *arguments):
        model = ["--model", tiny_model, "--device", "cpu"] if verb == "score" else []
        with pytest.raises(SystemExit) as ended:
            main([verb, *map(str, [*arguments, *model]), "--json"])
        said = capsys.readouterr()
        return json.loads(said.out) if ended.value.code == 0 else said.err

    return run


def test_from_files_to_a_selection(call, tmp_path, monkeypatch):
    pool = [write(tmp_path / f"{kind}.jsonl", kind, range(8)) for kind in WORDS]
    with pool[0].open("a") as stream:
        stream.write(json.dumps({"prompt": "long?", "completion": "x" * 300}) + "\n")
    target = write(tmp_path / "target.jsonl", "colours", range(20, 23))
    out = tmp_path / "out"
    asked = ["--gradients", 1024, "--warm-up", 0.3, "--target", target, "--out", out]
    asked += ["--max-length", 128]
    made = call("score", *pool, *asked)
    assert (made["rows"], made["target_rows"], made["failed_rows"]) == (16, 3, 1)
    assert (made["warmup_rows"], made["width"]) == (6, 4 * 1024)
    assert (made["computed"], made["found"]) == (19 * 4, 0)
    table = pl.read_parquet(made["gradients"])
    assert table.schema["embedding"] == pl.Array(pl.Float16, 4096)
    assert table.height == 19
    failed = pl.read_parquet(made["failed"])
    assert failed.select("row", "reason").rows() == [(9, "too_long")]
    again = call("score", *pool, *asked)
    assert (again["computed"], again["found"]) == (0, 19 * 4)
    assert pl.read_parquet(made["gradients"]).equals(table)
    assert not [p.name for p in out.iterdir() if p.name.startswith((".rows", ".target"))]

    chosen = ["less", *pool, "--target", target, "--embeddings", out, "--budget", 8]
    error = call("select", *chosen, "--out", tmp_path / "no")
    assert "run siftline score --gradients on these files" in error
    result = call("select", *chosen, "--on-missing", "drop", "--out", tmp_path / "got")
    assert result["removed"] == {"below_cut": 8, "no_embedding": 1}
    lines = pl.read_parquet(tmp_path / "got" / "selection.parquet").filter("kept")
    assert lines["file"].str.contains("colours").sum() >= 7  # by chance 4

    # Read in parts of three rows, or whole: the same lines.
    monkeypatch.setattr("siftline.cli.select_columns.PART_VALUES", 3 * 4096)
    chosen += ["--on-missing", "drop"]
    call("select", *chosen, "--out", tmp_path / "parts")
    monkeypatch.setattr("siftline.cli.select_run.parts_of", lambda folder, column: None)
    call("select", *chosen, "--out", tmp_path / "whole")
    expected = (tmp_path / "got" / "selection.parquet").read_bytes()
    for name in ("parts", "whole"):
        assert (tmp_path / name / "selection.parquet").read_bytes() == expected

    monkeypatch.undo()
    table.with_columns(pl.col("embedding").reverse()).write_parquet(out / "other.parquet")
    assert "has two embeddings of id" in call("select", *chosen, "--out", tmp_path / "no")


def test_what_cannot_be_is_refused_with_the_remedy(call, tmp_path):
    pool = write(tmp_path / "pool.jsonl", "sums", range(4))
    target = write(tmp_path / "target.jsonl", "sums", range(3, 6))
    out = ["--out", tmp_path / "out"]
    for arguments, said in (
        (["--gradients", 64], "--gradients needs --target FILE"),
        (["--target", target], "--target is for --gradients DIM"),
        (["--gradients", 64, "--target", target, "--turns", "all"], "--turns last"),
        (["--gradients", 64, "--target", pool], "4 rows are in FILE and in --target"),
    ):
        assert said in call("score", pool, *arguments, *out)
    out = ["--out", tmp_path / "selected"]
    less = ["less", pool, "--target", target, "--budget", 1, *out]
    assert "make them with siftline score --gradients" in call("select", *less)
    rounds = ["kmeans_quality_rounds", pool, "--budget", 2, *out]
    assert "give it to a recipe" in call("select", *rounds)
    bare = tmp_path / "bare"
    call("score", pool, "--gradients", 64, "--target", write(tmp_path / "t2.jsonl", "sums", [9]),
         "--warm-up", 0, "--out", bare)  # fmt: skip
    found = pl.read_parquet(bare / "gradients.parquet")
    assert found.schema["embedding"] == pl.Array(pl.Float16, 64)
    assert not (bare / "models").exists()
    error = call("select", *less, "--embeddings", bare)
    assert "give siftline score --gradients the same --target" in error


# ---- a recipe ------------------------------------------------------------------------------------


@pytest.fixture
def chain(tiny_model, tmp_path):
    """`chain(...)` is a recipe with one selection by gradients, its pools built; and its root."""
    from siftline.assets.shared import build

    numbers = {"pool": range(30), "target": range(40, 44)}
    for name, n in numbers.items():
        write(tmp_path / f"{name}.jsonl", "colours", n)
    write(tmp_path / "sums.jsonl", "sums", range(30))

    def source(name):
        return {"path": str(tmp_path / name), "source": name}

    data = {
        "name": "chain",
        "pool": {
            "name": "all",
            "buckets": 2,
            "inputs": [source("pool.jsonl"), source("sums.jsonl")],
        },
        "sets": {"target": [{"name": "aim", "buckets": 1, "inputs": [source("target.jsonl")]}]},
        "models": {"tiny": {"path": str(tiny_model), "device": "cpu", "max_length": 128}},
        "budget": {"unit": "rows", "size": 12, "on_shortfall": "smaller"},
    }
    workspace = Workspace(tmp_path / "root")
    small = {"dimensions": 256, "epochs": 2, "share": 0.1, "rank": 2}

    def made(gradients=small, **changes):
        stage = {"select": {"method": "less", "gradients": gradients}}
        recipe = parse({**data, "stages": [stage], **changes})
        for spec in (recipe.pool, *recipe.sets.target):
            build(workspace, recipe, spec.name, lambda line: None)
        return workspace, recipe

    made.small = small
    return made


def kept_of(output):
    return set(output.all_decisions().filter(outcome=KEPT)["id"])


def test_a_stage_warms_up_once_and_computes_once(chain, monkeypatch):
    workspace, recipe = chain()
    stage, said = recipe.stage("select"), []
    assert (models_used(recipe, stage), sets_used(stage)) == (("target",), ("target",))
    output, _ = run_stage(workspace, recipe, "select", said.append)
    assert output.accounting.closes
    assert output.accounting.kept == 12
    decided, facts = output.all_decisions(), output.facts
    gone = decided.filter(pl.col("outcome") != KEPT)
    assert decided.filter(outcome=KEPT)["value"].min() >= gone["value"].max()
    assert facts["warmup_rows"] == 6
    assert [step for step, _ in facts["checkpoints"]] == [1, 2]
    assert sum(weight for _, weight in facts["checkpoints"]) == pytest.approx(1)
    assert (facts["gradients_found"], facts["gradients_computed"]) == (0, 2 * (60 + 4))
    assert len(list(workspace.root.glob("models/warmup-*/warmup.json"))) == 1
    assert any("gradients" in line for line in said)
    # Another budget asks nothing anew.
    from siftline.training import warmup

    monkeypatch.setattr(warmup, "_train", lambda *a: pytest.fail("it was warmed up before"))
    _, wider = chain(budget={"unit": "rows", "size": 20})
    second, fresh = run_stage(workspace, wider, "select", said.append)
    assert fresh
    assert second.facts["gradients_computed"] == 0
    assert second.facts["gradients_found"] == facts["gradients_computed"]
    assert kept_of(output) < kept_of(second)


def test_a_recipe_without_a_target_or_with_one_too_long_is_refused(chain, tmp_path):
    workspace, recipe = chain(sets={})
    with pytest.raises(ValueError, match=r"selects towards a target.*add sets\.target"):
        run_stage(workspace, recipe, "select", lambda line: None)
    long = {"prompt": "long?", "completion": "x" * 300}
    (tmp_path / "target.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    workspace, recipe = chain(dict(chain.small, share=0.0))
    with pytest.raises(ValueError, match=r"1 target rows have no gradient features.*too_long"):
        run_stage(workspace, recipe, "select", lambda line: None)
