"""Recipes: what is shipped parses, what is wrong says so, and the hash moves when it must."""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from siftline.ingest.pool import PoolSpec
from siftline.ingest.readers import Source
from siftline.recipe import parse as library
from siftline.recipe.kinds import BUILT_IN, GATES, kind_of
from siftline.recipe.parse import (
    Bounds,
    Budget,
    Card,
    Inputs,
    Model,
    Recipe,
    Sets,
    Training,
    expand,
    expand_pool,
    load,
    parse,
)
from siftline.recipe.sections import Canaries
from siftline.scoring.engines.base import ModelSpec, Server
from siftline.scoring.measures.likelihood import Likelihood
from siftline.scoring.measures.scorers import KINDS
from siftline.training.evaluate import Evaluation
from siftline.training.finetune import FineTune
from siftline.training.pretrain import Pretrain

SHIPPED = sorted(library.SHIPPED.glob("*.yaml"))
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/*.yaml"))
SMALL = {
    "name": "small",
    "pool": {"name": "p", "inputs": [{"path": "a.jsonl"}]},
    "sets": {"dev": [{"name": "d", "inputs": [{"path": "d.jsonl"}]}]},
    "models": {"base": {"path": "models/base"}},
    "stages": ["duplicates", {"diversity": {"size": 10}}, "allocate"],
    "budget": {"size": 100},
}


def small(*overrides, **changes):
    return parse(copy.deepcopy(SMALL) | changes, overrides)


@pytest.mark.parametrize("path", [*SHIPPED, *EXAMPLES], ids=lambda p: p.stem)
def test_shipped_recipes_and_examples_parse_without_their_environment(path, monkeypatch):
    for name in ("GSM8K", "NATURAL_INSTRUCTIONS", "SMOLLM2", "TEST_DATA"):
        monkeypatch.delenv(f"SIFTLINE_{name}", raising=False)
    recipe = load(path)
    assert recipe.name == path.stem
    assert recipe.stages
    assert recipe.sets.test, "a shipped recipe proves itself"
    assert all(stage.kind in BUILT_IN for stage in recipe.stages)


def test_there_are_shipped_recipes():
    assert {"demo", "s3ft"} <= {path.stem for path in SHIPPED}
    assert {"gsm8k", "natural_instructions"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_generators_of_the_examples_stand_beside_them(path):
    asked = load(path).inputs
    assert asked is not None
    module, _, name = asked.generator.partition(":")
    assert (path.parent / f"{module}.py").is_file()
    assert callable(getattr(importlib.import_module(module), name))


def test_defaults_are_filled_in():
    recipe = small()
    assert recipe.seed == 0
    assert recipe.pool == PoolSpec("p", (Source("a.jsonl"),))
    assert recipe.model("target") == recipe.model("sampler") == Model(ModelSpec("models/base"))
    assert recipe.training is None
    assert recipe.evaluation is None
    assert recipe.budget == Budget(100, "loss_tokens", "error")
    assert [stage.name for stage in recipe.stages] == ["duplicates", "diversity", "allocate"]
    assert recipe.stage("diversity").options.size == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1
    with pytest.raises(ValueError, match="has no stage 'diversty': did you mean 'diversity'"):
        recipe.stage("diversty")


def test_the_seed_reaches_every_stage_but_the_hash_functions_of_duplicates():
    stages = [*(k for k in BUILT_IN if k != "allocate"), {"allocate": {"seed": 4}}]
    recipe = small(seed=3, stages=stages)
    for stage in recipe.stages:
        if stage.kind == "duplicates":
            continue
        if hasattr(stage.options, "seed"):
            assert stage.options.seed == (4 if stage.kind == "allocate" else 3), stage.name
    assert recipe.stage("duplicates").options == small(seed=0).stage("duplicates").options


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": []}, "recipe: unknown key 'stage': did you mean 'stages'?"),
        ({"hash": 1}, "recipe: unknown key 'hash': "),
        ({"name": "Big Name"}, "recipe: name 'Big Name': use lower-case letters, digits and _"),
        ({"seed": "x"}, "recipe.seed: expected int, found 'x'"),
        ({"seed": True}, "recipe.seed: expected int, found True"),
        ({"budget": {"size": 1, "unit": "tokens"}}, "budget.unit: 'tokens' is not one of "),
        ({"budget": {"unit": "rows"}}, "budget: 'size' is missing"),
        ({"budget": {"sise": 1}}, "budget: unknown key 'sise': did you mean 'size'?"),
        ({"pool": {"inputs": []}}, "pool: 'name' is missing"),
        ({"pool": {"name": "p", "inputs": [{"path": "a", "layuot": "x"}]}}, "pool.inputs[0]: unkn"),
        ({"pool": {"name": "p", "inputs": [{"path": "a"}], "buckets": 3}}, "a power of two, not 3"),
        ({"pool": {"name": "../p", "inputs": []}}, "pool and sets: name '../p': use letters"),
        ({"sets": {"dev": [{"name": "p", "inputs": []}]}}, "'p' occurs twice"),
        ({"sets": {"train": []}}, "sets: unknown key 'train': known: dev, target, test"),
        ({"models": None}, "models: expected a mapping, found None"),
        ({"models": ["a"]}, "models: expected a mapping, found ['a']"),
        ({"models": {"a": "path"}}, "models.a: expected a mapping, found 'path'"),
        ({"models": {"a": {}}}, "models.a: give either path, or pretrain and corpus"),
        ({"models": {"a": {"path": "x", "pretrain": {"steps": 1}}}}, "models.a: give either path"),
        ({"models": {"a": {"pretrain": {"steps": 1}}}}, "models.a: pretrain needs corpus"),
        ({"models": {"a": {"path": "x", "dtype": "fp8"}}}, "models.a.dtype: 'fp8' is not one of"),
        ({"models": {"a/b": {"path": "x"}}}, "models: name 'a/b': use letters"),
        ({"models": {"a": {"path": "x"}, "b": {"path": "y"}}}, "roles: 'target' is missing"),
        ({"roles": ["target"]}, "roles: expected a mapping, found ['target']"),
        ({"roles": {"target": "bse"}}, "roles.target: no model 'bse': did you mean 'base'?"),
        ({"roles": {"tarjet": "base", "target": "base"}}, "roles: unknown role 'tarjet': did you"),
        ({"stages": []}, "stages: expected a list of stages"),
        ({"stages": "duplicates"}, "stages: expected a list of stages"),
        ({"stages": ["duplicate"]}, "stages[0]: unknown stage 'duplicate': did you mean 'duplicat"),
        ({"stages": ["verify", {"allocate": 3}]}, "stages[1].allocate: expected options, found 3"),
        ({"stages": [{"verify": {}, "allocate": {}}]}, "stages[0]: expected one stage, found"),
        ({"stages": [{"confidence": {"reflection": 1}}]}, "reflection: 1 is not one of 'auto'"),
        ({"stages": [3]}, "stages[0]: expected one stage, found 3"),
        ({"stages": [{"duplicates": {"treshold": 1}}]}, "did you mean 'threshold'?"),
        (
            {"stages": [{"verify": {"name": "v", "no_final_answer": "keep"}}, "x"]},
            "stages[1]: unknown stage",
        ),
        ({"stages": ["verify", "verify"]}, "stages: 'verify' occurs twice: give one of them"),
        ({"stages": [{"verify": {"name": "a/b"}}]}, "stages: name 'a/b': use letters"),
        ({"stages": ["allocate", "verify"]}, "stages: allocate spends the budget: put it last"),
        ({"stages": ["allocate", {"allocate": {"name": "b"}}]}, "put it last, once"),
        ({"training": {"arms": ["best"]}}, "training: arm 'best' is unknown: choose full, random"),
        ({"training": {"seeds": []}}, "training: seeds is empty"),
        ({"training": {"options": {"method": "lorra"}}}, "training.options"),
        ({"bounds": {"max_failed": "many"}}, "bounds.max_failed: expected float, found 'many'"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_place_and_remedy(changes, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
        small(**changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "pool", "models", "stages", "budget"])
def test_what_every_recipe_has(key):
    data = {k: v for k, v in SMALL.items() if k != key}
    with pytest.raises(ValueError, match=f"recipe: '{key}' is missing"):
        parse(data)


@pytest.mark.parametrize("key", ["unit", "size", "on_shortfall"])
def test_the_budget_is_stated_once(key):
    with pytest.raises(ValueError, match=f"stages.allocate: '{key}' belongs to the recipe's budg"):
        small(stages=[{"allocate": {key: 1}}])
    budget = {"size": 7, "unit": "rows", "on_shortfall": "smaller"}
    options = small(budget=budget).stage("allocate").options
    assert (options.size, options.unit, options.on_shortfall) == (7, "rows", "smaller")


def test_set_changes_values_deep_inside():
    recipe = small(
        "budget.size=5",
        "stages.duplicates.threshold=0.7",
        "sets.dev.d.buckets=2",
        "training.options.learning_rate=1e-4",
        "schedule=0 4 * * *",
    )
    assert recipe.budget.size == recipe.stage("allocate").options.size == 5
    assert recipe.stage("duplicates").options.threshold == 0.7
    assert recipe.sets.dev[0].buckets == 2
    assert recipe.training.options.learning_rate == 1e-4
    assert recipe.schedule == "0 4 * * *"
    assert [s.kind for s in small("stages=[verify, allocate]").stages] == ["verify", "allocate"]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("budget.size", "expected key=value"),
        ("budget.sise=1", "budget: unknown key 'sise': did you mean 'size'?"),
        ("stages.dupes.threshold=1", "no entry 'dupes'"),
        ("stages.duplicates.threshold=high", "stages.duplicates.threshold: expected float"),
        ("models.base.dtype=fp8", "models.base.dtype: 'fp8' is not one of"),
        ("bugdet.size=1", "recipe: unknown key 'bugdet': did you mean 'budget'?"),
    ],
)
def test_set_is_held_to_the_same_rules(assignment, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
        small(assignment)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_set_leaves_the_mapping_it_was_given_alone():
    before = copy.deepcopy(SMALL)
    parse(SMALL, ["budget.size=5", "stages.duplicates.threshold=0.7", "sets.dev.d.buckets=2"])
    assert before == SMALL


# The hash


def turned(node):
    """The same data with every mapping's keys in reverse."""
    if isinstance(node, dict):
        return {key: turned(node[key]) for key in reversed(node)}
    return [turned(item) for item in node] if isinstance(node, list) else node


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_hash_does_not_depend_on_key_order_schedule_or_spelled_out_defaults(path):
    data = yaml.safe_load(path.read_text())
    recipe = parse(data)
    assert parse(turned(data)).hash == recipe.hash
    assert parse(data, ["schedule=5 5 * * *"]).hash == recipe.hash
    assert parse(data, ["pool.buckets=2"]).hash == recipe.hash  # how a pool is cut shows nowhere
    assert parse(data, ["seed=0", "bounds.max_removed=0.9"]).hash == recipe.hash


def test_hash_moves_with_everything_else():
    hashes = [
        small(*overrides).hash
        for overrides in (
            [],
            ["seed=1"],
            ["budget.size=101"],
            ["stages.duplicates.threshold=0.71"],
            ["stages.diversity.name=other"],
            ["sets.dev.d.max_quarantine=0.1"],
            ["models.base.dtype=bfloat16"],
            ["card.license=mit"],
            ["training.epochs=2"],
            ["evaluation.max_new_tokens=9"],
            ["stages=[diversity, duplicates, allocate]"],
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 64 for h in hashes)


def test_hash_is_the_same_in_another_process_and_without_the_environment(tmp_path):
    path = tmp_path / "small.yaml"
    data = SMALL | {"inputs": {"generator": "a:b", "args": {"data": "${SIFTLINE_NOWHERE}"}}}
    path.write_text(yaml.safe_dump(data))
    code = (
        "import sys; from pathlib import Path; from siftline.recipe.parse import load\n"
        "print(load(Path(sys.argv[1])).hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={"PYTHONHASHSEED": "5", "SIFTLINE_NOWHERE": "/somewhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == load(path).hash


# Variables


def test_variables_are_expanded_when_used_and_not_before(monkeypatch):
    monkeypatch.delenv("SIFTLINE_NOWHERE", raising=False)
    recipe = small(pool={"name": "p", "inputs": [{"path": "${SIFTLINE_NOWHERE}/a"}]})
    with pytest.raises(ValueError, match="variable SIFTLINE_NOWHERE is not set: set it") as caught:
        expand_pool(recipe.pool, Path("in"))
    assert "\n" not in str(caught.value)
    before = recipe.hash
    monkeypatch.setenv("SIFTLINE_NOWHERE", "/data")
    assert expand_pool(recipe.pool, Path("in")).inputs[0].path == "/data/a"
    assert recipe.hash == before


def test_inputs_stand_for_the_generators_folder(monkeypatch):
    monkeypatch.setenv("SIFTLINE_SOME", "x")
    assert expand("{inputs}/a-${SIFTLINE_SOME}", Path("root/in")) == "root/in/a-x"
    assert expand("{inputs}/a") == "{inputs}/a"
    assert expand("$SIFTLINE_SOME {other}", Path("in")) == "$SIFTLINE_SOME {other}"


# Gates after sampling


def test_sampled_rows_go_through_the_gates_again():
    stages = [
        "duplicates",
        {"decontamination": {"name": "clean"}},
        "verify",
        {"likelihood": {"max_drop": 0.02}},
        "diversity",
        "rejection_sampling",
        {"confidence": {"samples": 2}},
        "allocate",
    ]
    recipe = small(stages=stages)
    names = [(s.name, s.kind, s.scope) for s in recipe.stages]
    at = [s.kind for s in recipe.stages].index("rejection_sampling")
    assert names[at + 1 : at + 4] == [
        ("duplicates_added", "duplicates", "added"),
        ("clean_added", "decontamination", "added"),
        ("likelihood_added", "likelihood", "added"),
    ]
    assert [n for n, _, scope in names if scope == "added"] == [
        n for n, *_ in names[at + 1 : at + 4]
    ]
    assert recipe.stage("likelihood_added").options == recipe.stage("likelihood").options
    changed = small("stages.likelihood.max_drop=0.03", stages=stages)
    assert changed.stage("likelihood_added").options.max_drop == 0.03


def test_sampling_twice_names_both_rounds_of_gates():
    recipe = small(
        stages=["duplicates", "rejection_sampling", {"rejection_sampling": {"name": "more"}}]
    )
    assert [s.name for s in recipe.stages] == [
        "duplicates",
        "rejection_sampling",
        "duplicates_added",
        "more",
        "duplicates_added_more",
    ]


def test_roles_of_stages():
    roles = {kind: kind_of(kind).role for kind in BUILT_IN}
    assert all(roles[kind] == "gate" for kind in GATES)
    assert [kind for kind, role in roles.items() if role == "budget"] == ["allocate"]


# Files


def test_a_file_that_is_no_recipe_names_itself(tmp_path):
    def said(text):
        (tmp_path / "r.yaml").write_bytes(text)
        with pytest.raises(ValueError, match=r"r\.yaml: ") as caught:
            load(tmp_path / "r.yaml")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not YAML" in said(b"a: [1")
    assert "not YAML" in said(b"\xff\xfe\xfa")
    assert "expected a mapping, found list" in said(b"- a")
    assert "expected a mapping, found NoneType" in said(b"")
    assert "recipe: 'name' is missing" in said(b"seed: 1")
    with pytest.raises(ValueError, match="no such recipe file"):
        load(tmp_path / "none.yaml")


def test_the_library_finds_users_recipes_beside_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, os.pathsep.join([str(tmp_path), str(tmp_path / "none")]))
    data = json.loads(json.dumps(SMALL))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data))
    assert library.find("small", ["seed=3"]).seed == 3
    names = [recipe.name for recipe in library.all_recipes()]
    assert names == sorted({*(p.stem for p in SHIPPED), "small"})
    with pytest.raises(ValueError, match="no recipe 'smal': did you mean 'small'"):
        library.find("smal")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(data | {"name": "demo", "seed": 9}))
    assert library.find("demo").seed == 9  # a user's file takes the place of a shipped one
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=r"other.yaml: its name is 'small': rename one"):
        library.find("other")


# The ratchet: a field that appears, goes or is renamed changes every recipe file and every hash.

PUBLIC = {
    "Recipe": "name seed pool sets models roles stages budget likelihood scorers bounds card "
    "inputs training evaluation canaries schedule",
    "Inputs": "generator args",
    "Sets": "target dev test",
    "Model": "spec pretrain corpus",
    "Budget": "size unit on_shortfall",
    "Bounds": "max_failed max_removed",
    "Canaries": "per_kind",
    "Card": "license description language tags",
    "Training": "options arms epochs seeds reference",
    "PoolSpec": "name inputs buckets max_quarantine holds",
    "Source": "path format layout columns source instruction answer_pattern split set_aside",
    "ModelSpec": "path engine dtype device max_length template batch_tokens trust_remote_code "
    "python adapter server revision",
    "Server": "url model concurrency timeout_s tries patience_s key_variable",
    "Likelihood": "turns details",
    "Reward": "model",
    "Classifier": "model label expected over",
    "Rubric": "model rubric scale",
    "Contrast": "model reference turns",
    "Column": "column path id",
    "Function": "path args",
    "Evaluation": "max_new_tokens temperature verifier level_column batch_tokens batch_rows seed "
    "retained",
    "FineTune": "method peft objective kl_weight mask_rate prompt_weight source_balance "
    "weight_column reference_column lora_rank learning_rate epochs phases loss_tokens "
    "steps batch_rows accumulation max_length warmup_ratio schedule weight_decay "
    "gradient_checkpointing bf16 packing save_steps eval_steps keep report_to",
    "Pretrain": "tokenizer vocab hidden layers heads context steps batch_tokens lr warmup seed",
    "Duplicates": "threshold ngram num_perm numbers seed max_rows keep",
    "Decontamination": "ngram min_share common near seed",
    "QualityRules": "text languages keep min_language min_letters identify words scores",
    "Verify": "verifier no_final_answer open",
    "LikelihoodOutliers": "max_drop tail cut min_group",
    "Shortlist": "size oversampling keep_rate clusters quota weight seed",
    "Confidence": "samples temperature top_p max_new_tokens answers similarity reflection "
    "questions weight_consistency weights join threshold cut seed",
    "Correct": "folds confidence training max_new_tokens verifier seed",
    "RejectionSampling": "target k target_scores difficulty pilot cap unsolved_cap max_quantile "
    "max_similarity screen negatives max_draws max_tokens temperature top_p max_new_tokens "
    "verifier seed",
    "SelfAnswers": "draws paraphrases temperature top_p max_new_tokens verifier screen seed",
    "Allocate": "size unit on_shortfall quota targets answers max_quantile fit own_samples "
    "mixture temperature caps levels seed",
    "Select": "method options oversampling gradients seed",
}
CLASSES = (
    Recipe, Inputs, Sets, Model, Budget, Bounds, Canaries, Card, Training, PoolSpec, Source,
    ModelSpec,
    Server, Likelihood, *KINDS.values(), Evaluation, FineTune, Pretrain,
    *(kind_of(kind).options for kind in BUILT_IN),
)  # fmt: skip


def test_public_fields_are_exactly_these():
    found = {c.__name__: [f.name for f in dataclasses.fields(c) if f.init] for c in CLASSES}
    assert found == {name: names.split() for name, names in PUBLIC.items()}


@pytest.mark.parametrize(
    "cls", [c for c in CLASSES if c not in (Recipe, Sets)], ids=lambda c: c.__name__
)
def test_every_option_is_documented(cls):
    assert cls.__doc__ is not None
    for f in dataclasses.fields(cls):
        assert f"\n        {f.name}: " in cls.__doc__, f"{cls.__name__}.{f.name}"


def test_draws_are_held_to_the_verifier_of_the_rows():
    recipe = small(stages=[{"verify": {"verifier": "regex"}}, "rejection_sampling", "s3ft"])
    kinds = {s.kind: s.options for s in recipe.stages}
    assert kinds["rejection_sampling"].verifier == kinds["s3ft"].verifier == "regex"
    own = small(
        stages=[{"verify": {"verifier": "regex"}}, {"rejection_sampling": {"verifier": "exact"}}]
    )
    assert own.stages[1].options.verifier == "exact"
    assert small(stages=["rejection_sampling"]).stages[0].options.verifier == "math"
