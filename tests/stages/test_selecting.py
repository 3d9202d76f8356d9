"""The select stage: registered methods inside a recipe."""

import json
from dataclasses import replace
from types import SimpleNamespace

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml

from siftline.assets import step as keys
from siftline.assets.stages import stage_asset
from siftline.ingest.pool import Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source
from siftline.recipe.parse import parse
from siftline.rows import schema
from siftline.rows.ledger import KEPT, REMOVED
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.recorder import Recorder
from siftline.selectors.less import Gradients
from siftline.selectors.registry import METHODS, find
from siftline.selectors.spending import Budget
from siftline.stages.context import Context
from siftline.stages.models import engines
from siftline.stages.run import models_used, run_stage, sets_used
from siftline.stages.select import run as selecting
from siftline.stages.select.options import Select
from siftline.workspace import Workspace

BUDGET = 1200
RUN = ("random", "perplexity", "ifd", "kmeans_quality", "rds_plus", "dsir", "best_fit")


def quiet(line): ...


@pytest.fixture
def recipe_of(mini):
    """The mini recipe with duplicates and one selection; its dev set plays the target."""
    from siftline.recipe.parse import recipe_files

    mini()
    data = yaml.safe_load(recipe_files()["mini"].read_text(encoding="utf-8"))
    data["sets"]["target"] = data["sets"].pop("dev")

    def made(method, **changes):
        stage = {"select": {"method": method, **changes.pop("stage", {})}}
        budget = {"unit": "loss_tokens", "size": BUDGET, "on_shortfall": "smaller"}
        return parse({**data, "stages": ["duplicates", stage], "budget": budget, **changes})

    return made


@pytest.fixture(scope="module")
def root(finished, mini_tools, tmp_path_factory):
    return mini_tools.copy_root(finished.root, tmp_path_factory.mktemp("select") / "root")


@pytest.mark.parametrize("method", RUN)
def test_a_method_spends_the_budget_on_the_rows_in_play(method, root, recipe_of):
    workspace, recipe = Workspace(root), recipe_of(method)
    before, _ = run_stage(workspace, recipe, "duplicates", quiet)
    output, _ = run_stage(workspace, recipe, "select", quiet)
    assert output.accounting.closes
    decided = output.all_decisions()
    kept = decided.filter(outcome=KEPT)
    assert set(decided["id"]) == set(before.all_decisions().filter(outcome=KEPT)["id"])
    assert 0 < kept.height < decided.height
    assert decided.filter(outcome=REMOVED)["reason"].null_count() == 0
    facts = output.facts
    assert facts["method"] == method
    assert facts["spent"] <= BUDGET == facts["size"]
    assert facts["spent"] > BUDGET - 130  # the longest response has 120 tokens
    ranks = output.table("ranks")
    assert set(ranks["id"]) == set(decided["id"])
    first = ranks.filter(pl.col("rank") <= kept.height)
    assert set(first["id"]) == set(kept["id"])
    again, computed = run_stage(workspace, recipe, "select", quiet)
    assert not computed
    assert again.manifest.version == output.manifest.version


@pytest.fixture
def small(tmp_path, tiny_model):
    """`small(method, …)` runs the stage on 20 rows with six target rows and a tiny model."""

    def sums(name, numbers):
        lines = [{"q": f"{i}+{i}?", "r": f"It is {2 * i}"} for i in numbers]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        source = Source(path=str(path), columns={"question": "q", "response": "r"})
        build_pool(workspace.pool(name), PoolSpec(name=name, inputs=(source,), buckets=2))

    workspace = Workspace(tmp_path / "root")
    sums("p", range(20))
    sums("t", range(30, 36))

    def run(method, target=True, **options):
        inputs = [{"path": "x.jsonl"}]
        sets = {"target": [{"name": "t", "inputs": inputs, "buckets": 2}]} if target else {}
        recipe = parse(
            {
                "name": "r",
                "pool": {"name": "p", "inputs": inputs, "buckets": 2},
                "sets": sets,
                "models": {"m": {"path": str(tiny_model), "max_length": 100, "device": "cpu"}},
                "stages": [{"select": {"method": method, "options": options}}],
                "budget": {"size": 5, "unit": "rows"},
            }
        )
        stage, pool = recipe.stage("select"), Pool(workspace.pool("p"))
        with engines() as opened:
            return selecting.run(Context(workspace, recipe, stage, pool, [], opened, quiet)), stage

    run.workspace = workspace
    return run


def test_the_loss_drop_is_that_of_a_model_trained_on_the_target_alone(small, tiny_model):
    """Beside plain transformers: the share of a row's loss that the warmed-up model takes away."""
    import torch
    from transformers import AutoModelForCausalLM

    from siftline.scoring.spans import response_span
    from siftline.scoring.templates import load_tokenizer

    ran, stage = small("loss_drop", learning_rate=3e-3, epochs=2, batch_rows=3)
    facts = ran.facts
    assert (facts["target_rows"], facts["warmup_steps"], facts["warmup_skipped"]) == (6, 4, 0)
    assert facts["warmup_loss"][1] < facts["warmup_loss"][0]
    assert sets_used(stage) == ("target",)
    (warm,) = (small.workspace.root / "models").glob("warmup-*/config.json")
    tokenizer = load_tokenizer(ModelSpec(str(tiny_model)))
    models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in (tiny_model, warm.parent)]
    drops = {}
    for row in Pool(small.workspace.pool("p")).all_rows().to_pylist():
        tokens, (start, end) = response_span(tokenizer, row["messages"])
        losses = []
        for model in models:
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            losses.append(-np.mean([float(logs[i - 1, tokens[i]]) for i in range(start, end)]))
        drops[row["id"]] = (losses[0] - losses[1]) / losses[0]
    decided = pl.concat([result.decisions for result in ran.results])
    removed = decided.filter(~pl.col("kept"))
    for identity, value in removed.select("id", "value").iter_rows():
        assert value == pytest.approx(drops[identity], abs=1e-4)
    kept = set(decided.filter("kept")["id"])
    assert len(kept) == 5
    assert min(drops[i] for i in kept) >= max(removed["value"]) - 1e-4
    again, _ = small("loss_drop", learning_rate=3e-3, epochs=2, batch_rows=3)
    pairs = zip(again.results, ran.results, strict=True)
    assert all(one.decisions.equals(other.decisions) for one, other in pairs)
    with pytest.raises(ValueError, match=r"warms up on a target.*add sets\.target"):
        small("loss_drop", target=False)


def test_rds_plus_is_given_conversations_and_other_methods_texts(small, monkeypatch):
    seen = []
    for name in ("embed_texts", "embed_conversations"):
        real = getattr(selecting, name)

        def noted(recorder, bucket, asked, name=name, real=real):
            seen.append(name)
            return real(recorder, bucket, asked)

        monkeypatch.setattr(selecting, name, noted)
    for method, wanted in (("rds_plus", "embed_conversations"), ("got_d", "embed_texts")):
        seen.clear()
        ran, _ = small(method)
        assert set(seen) == {wanted}
        assert sum(int(result.decisions["kept"].sum()) for result in ran.results) == 5


def test_options_seed_and_oversampling_count(root, recipe_of):
    workspace = Workspace(root)

    def kept(**stage):
        recipe = recipe_of("random", stage=stage)
        run_stage(workspace, recipe, "duplicates", quiet)
        output, _ = run_stage(workspace, recipe, "select", quiet)
        return set(output.all_decisions().filter(outcome=KEPT)["id"])

    assert kept() == kept(seed=0)
    assert kept() != kept(seed=1)
    assert kept() < kept(oversampling=2.0)


def test_a_budget_and_the_turns_that_are_scored_are_part_of_the_key(root, recipe_of):
    workspace = Workspace(root)
    run_stage(workspace, recipe_of("random"), "duplicates", quiet)
    first, _ = run_stage(workspace, recipe_of("random"), "select", quiet)
    small = recipe_of("random", budget={"unit": "loss_tokens", "size": 500})
    second, computed = run_stage(workspace, small, "select", quiet)
    assert computed
    assert second.facts["spent"] <= 500 < first.facts["spent"]


def test_a_budget_in_rows_needs_no_model(root, recipe_of):
    recipe = recipe_of("balanced_random", budget={"unit": "rows", "size": 20})
    stage = recipe.stage("select")
    assert (models_used(recipe, stage), sets_used(stage)) == ((), ())
    workspace = Workspace(root)
    run_stage(workspace, recipe, "duplicates", quiet)
    output, _ = run_stage(workspace, recipe, "select", quiet)
    assert output.accounting.kept == 20
    sources = {r["id"]: r["source"] for r in Pool(workspace.pool("mini")).all_rows().to_pylist()}
    taken = {sources[i] for i in output.all_decisions().filter(outcome=KEPT)["id"]}
    assert len(taken) > 3


def test_the_asset_waits_for_what_the_method_reads(recipe_of):
    recipe = recipe_of("rds_plus")
    stage = recipe.stage("select")
    asset = stage_asset(recipe, stage)
    deps = asset.asset_deps[keys.stage(recipe, stage)]
    assert {keys.likelihood(recipe), keys.pool(recipe.sets.target[0])} <= set(deps)
    assert isinstance(asset, dg.AssetsDefinition)
    rows = recipe_of("random", budget={"unit": "rows", "size": 20})
    plain = stage_asset(rows, rows.stage("select")).asset_deps[keys.stage(rows, stage)]
    assert keys.likelihood(rows) not in plain


def test_what_cannot_be_selected_is_refused_with_the_remedy(root, recipe_of):
    with pytest.raises(ValueError, match="no method 'rds_pls': did you mean 'rds_plus'"):
        recipe_of("rds_pls")
    with pytest.raises(ValueError, match="options of random"):
        recipe_of("random", stage={"options": {"sede": 1}})
    with pytest.raises(ValueError, match="oversampling is 0"):
        recipe_of("random", stage={"oversampling": 0})
    with pytest.raises(ValueError, match="no scorer 'complexity': add it to the recipe's scorers"):
        recipe_of("deita")
    recipe = recipe_of("rds_plus", sets={})
    run_stage(Workspace(root), recipe, "duplicates", quiet)
    with pytest.raises(ValueError, match=r"selects towards a target.*add sets\.target"):
        run_stage(Workspace(root), recipe, "select", quiet)


def test_a_pool_too_large_is_refused_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(selecting, "MAX_VALUES", 100)
    turns = [schema.message("user", "Why?"), schema.message("assistant", "So.")]
    rows = [schema.make_row([*turns[:1], {**turns[1], "content": str(i)}]) for i in range(8)]
    blank = [{**row, "parent_id": row["id"], "origin": "x"} for row in rows]
    table = pa.Table.from_pylist(blank, schema=schema.ADDED).sort_by("id")
    asked = []

    class Embedder:
        def fingerprint(self):
            return "embedder"

        def embed_texts(self, texts):
            asked.extend(texts)
            return np.ones((len(texts), 20), np.float32)

    def never(context):
        raise AssertionError("gradients were made")

    monkeypatch.setattr(selecting, "featured", never)
    recorder = Recorder(Embedder(), ModelSpec("nowhere"), tmp_path)
    halves = [table.slice(0, 4), table.slice(4)]

    def run(method, **options):
        stage = SimpleNamespace(name="select", options=Select(method, **options))
        return selecting.run(
            SimpleNamespace(
                stage=stage,
                recipe=SimpleNamespace(budget=Budget(3, "rows")),
                buckets=range(2),
                rows=halves.__getitem__,
                store_buckets=lambda: enumerate(halves),
                recorders=lambda role, progress: [recorder],
                emit=quiet,
            )
        )

    with pytest.raises(ValueError, match="8 rows x 16 dimensions is over 100 values"):
        run("less", gradients=Gradients(dimensions=4, epochs=4))
    with pytest.raises(AssertionError, match="gradients were made"):  # without a warm-up: one pass
        run("less", gradients=Gradients(dimensions=4, epochs=4, share=0.0))
    with pytest.raises(ValueError, match="8 rows x 20 dimensions is over 100 values"):
        run("kmeans_quality")
    assert len(asked) == 4  # the first of two buckets
    with_limit = replace(find("random"), limit=7)
    monkeypatch.setattr(Select, "entry", property(lambda self: with_limit))
    with pytest.raises(ValueError, match="8 rows, and random takes 7 at most"):
        run("random")


def test_vectors_move_to_the_buckets_of_their_rows():
    values = {f"{i:02d}": np.full(3, i, np.float16) for i in range(6)}
    frames = [pl.DataFrame({"id": ids}) for ids in (["00", "x", "02"], ["05", "04"])]
    nothing = pl.DataFrame({"id": []}, schema={"id": pl.String})
    held = dict(values)
    first, second, last = selecting._with_vectors([*frames, nothing], held)
    assert sorted(held) == ["01", "03"]  # of no row: all others are held once
    assert first["id"].to_list() == ["00", "02"]
    assert second["embedding"].to_list() == [[5.0] * 3, [4.0] * 3]
    kinds = {frame.schema["embedding"] for frame in (first, second, last)}
    assert kinds == {pl.Array(pl.Float16, 3)}


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_registered_method_is_a_stage(entry):
    stage = Select(entry.name)
    assert stage.embeds == any("embeddings" in need for need in entry.needs)
    assert stage.likelihoods("loss_tokens")
    assert set(stage.scorers()) <= set(stage.numbers())
