"""Arms that learn by poft: whose scores they compare with, and that each row gets its own."""

import json
import shutil

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool, build_pool
from siftline.recipe.parse import parse
from siftline.rows import schema
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.spans import response_span
from siftline.scoring.templates import load_tokenizer
from siftline.stages import arms
from siftline.stages import arms as references
from siftline.stages.arms import reference_scores, train_arms
from siftline.stages.select.rounds import round_options
from siftline.workspace import Workspace

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FAST = {"batch_rows": 4, "max_length": 200, "learning_rate": 3e-3, "warmup_ratio": 0}
POOL = {"columns": {"messages": "messages", "source": "source"}}
REFERENCES = ["strong", "stronger"]


def row(i):
    answer = f"It is {2 * i}" + ", and so on" * (i % 4)
    return schema.make_row(
        [schema.message("user", f"{i}+{i}?"), schema.message("assistant", answer)], source="s"
    )


def table(numbers):
    """Rows in an order that is not that of their ids, so that a join by place shows."""
    lines = sorted((row(i) for i in numbers), key=lambda line: line["id"][::-1])
    assert [line["id"] for line in lines] != sorted(line["id"] for line in lines)
    return pa.Table.from_pylist(lines, schema=schema.ROW)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """A target and two references; one has a tokenizer and a template of its own."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": tiny.make_model(folder / "target"),
        "strong": tiny.make_model(folder / "strong", seed=1, bos=True, template=PLAIN),
        "stronger": tiny.make_model(folder / "stronger", seed=2, merges=[("I", "t"), ("s", "o")]),
    }


@pytest.fixture
def project(tmp_path, models, make_version):
    """A root with a pool and a published version; `recipe(...)` is one that trained on it."""
    workspace = Workspace(tmp_path / "root")
    lines = [{"messages": row(i)["messages"], "source": "s"} for i in range(24)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def recipe(options=None, **more):
        specs = {name: {"path": str(path)} for name, path in models.items()}
        data = {
            "name": "mine",
            "pool": {
                "name": "p",
                "buckets": 2,
                "inputs": [POOL | {"path": str(tmp_path / "pool.jsonl")}],
            },
            "sets": {"dev": [{"name": "d", "inputs": [{"path": "d.jsonl"}]}]},
            "models": {**specs, **more.pop("models", {})},
            "roles": {"target": "target"},
            "stages": ["duplicates", "allocate"],
            "budget": {"size": 100},
            "training": {
                "options": FAST | {"objective": "poft"} | (options or {}),
                "reference": REFERENCES,
                **more,
            },
        }
        found = parse(data)
        object.__setattr__(found, "sets", type(found.sets)())  # no dev loss here
        build_pool(workspace.pool("p"), found.pool)
        shutil.rmtree(workspace.curated("mine"), ignore_errors=True)
        # 40 is no row of the pool: so are those that sampling adds.
        rows = table([*range(8), 40])
        make_version(workspace.curated("mine"), [rows], {"recipe_hash": found.hash})
        return found

    recipe.workspace = workspace
    return recipe


def by_hand(folder, line, template=None):
    """Mean log-probability of the response, without this package's scoring."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(ModelSpec(path=str(folder)))
    tokens, (start, end) = response_span(tokenizer, line["messages"], template)
    with torch.no_grad():
        logs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, tokens[i]]) for i in range(start, end)) / (end - start)


def watched(monkeypatch):
    """What every training was given, by arm and seed."""
    seen, train = [], arms.finetune

    def finetune(base, data, out, config, **more):
        seen.append((more["dataset_version"], data, more["references"]))
        return train(base, data, out, config, **more)

    monkeypatch.setattr(arms, "finetune", finetune)
    return seen


def test_every_arm_learns_against_its_own_rows_scores(project, models, monkeypatch, forwards):
    recipe, seen, said = project(seeds=[0, 1]), watched(monkeypatch), []
    trained = train_arms(project.workspace, recipe, said.append)
    assert [(arm.arm, arm.seed) for arm in trained] == [
        ("random", 0), ("curated", 0), ("random", 1), ("curated", 1),
    ]  # fmt: skip
    for _, data, scores in seen:
        assert set(data["id"].to_pylist()) <= set(scores)
    assert seen[0][1]["id"].to_pylist() != seen[2][1]["id"].to_pylist()
    every = {line["id"]: line for _, data, _ in seen for line in data.to_pylist()}
    assert row(40)["id"] in every
    scores = seen[0][2]
    assert set(scores) == set(every)
    for identity in sorted(every)[::3]:
        means = [by_hand(models[name], every[identity]) for name in REFERENCES]
        assert scores[identity] == pytest.approx(sum(means) / 2, abs=1e-5)
    assert len({round(score, 4) for score in scores.values()}) > len(scores) // 2
    # With its prompt and without, once a row and model, though arms and seeds share rows.
    assert forwards["inspect"] <= 2 * 2 * len(every)
    assert any("reference stronger" in line for line in said)
    curve = trained[0].curve
    assert {"ce", "mean_weight"} <= set(curve.columns)
    assert 0 < curve["mean_weight"][0] < 1


def test_trained_arms_are_found_without_their_references(project, models, monkeypatch, forwards):
    recipe = project(arms=["curated"])
    first = train_arms(project.workspace, recipe, lambda line: None)
    asked = forwards["inspect"]
    for path in (project.workspace.root / "references").iterdir():
        path.unlink()
    again = train_arms(project.workspace, recipe, lambda line: None)  # out of the store
    assert forwards["inspect"] == asked
    assert [arm.folder for arm in again] == [arm.folder for arm in first]

    def closed():
        raise AssertionError("no model is needed")

    monkeypatch.setattr(references, "engines", closed)
    train_arms(project.workspace, recipe, lambda line: None)


def test_other_references_are_another_run(project):
    folders = [
        train_arms(project.workspace, project(arms=["curated"], reference=names), print)[0].folder
        for names in (["strong"], ["stronger"])
    ]
    assert folders[0] != folders[1]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 2


def test_scores_go_by_id_whatever_the_order_and_the_parts(project):
    recipe = project()
    rows = table(range(6))
    backwards = rows.take(list(range(5, -1, -1)))
    told = [
        reference_scores(Workspace(project.workspace.root / str(i)), recipe, parts, print)
        for i, parts in enumerate(([rows], [backwards], [rows.slice(3), backwards, rows]))
    ]
    assert told[0] == told[1] == told[2]
    assert set(told[0]) == set(rows["id"].to_pylist())
    bare = reference_scores(project.workspace, recipe, [rows.select(["id", "messages"])], print)
    assert bare == told[0]


def test_a_row_without_a_score_stops_before_training(project, models):
    short = {"strong": {"path": str(models["strong"]), "max_length": 60}}
    long = row(3)["id"]
    said = rf"'strong' has no score for \d of \d+ training rows, first .*{long} \(too_long\)"
    with pytest.raises(ValueError, match=said) as caught:
        train_arms(project.workspace, project(models=short, arms=["curated"]), print)
    assert "raise models.strong.max_length or lower training.options.max_length" in str(
        caught.value
    )
    assert not (project.workspace.root / "models").exists()
    # What training skips needs no score.
    recipe = project({"max_length": 60}, models=short, arms=["curated"])
    assert train_arms(project.workspace, recipe, print)[0].loss_tokens > 0


def test_rows_of_the_pool_and_added_ones_may_come_as_they_are_read(project):
    recipe = project()
    pool = Pool(project.workspace.pool("p")).all_rows(["id", "messages", "tools", "source"])
    scores = reference_scores(project.workspace, recipe, [pool, table([1, 2, 3, 5, 40])], print)
    assert len(scores) == 25


EMBEDDER = {"st": {"path": "x", "engine": "sentence-transformers"}}


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"reference": []}, r"objective poft needs reference models: name them, reference: \["),
        ({"options": {"objective": "dft"}}, "reference names strong, stronger, which only"),
        ({"reference": ["strong", "strong"]}, "reference is strong, strong: name each model once"),
        ({"reference": ["best"]}, "no model 'best': choose target, strong, stronger"),
        ({"reference": ["st"], "models": EMBEDDER}, "'st' only embeds: name a causal model"),
    ],
)  # fmt: skip
def test_what_a_recipe_may_say_of_references(project, training, said):
    with pytest.raises(ValueError, match=said):
        project(**training)


def test_a_round_of_a_selector_has_no_references(project):
    assert round_options(project()).objective == "sft"
    assert round_options(project({"objective": "dft"}, reference=[])).objective == "dft"


IDS = st.lists(st.lists(st.sampled_from("abcdef"), unique=True), min_size=1, max_size=4)


@given(IDS)
@settings(max_examples=40, deadline=None)
def test_parts_become_one_table_and_lose_nothing(groups):
    turns = [schema.message("user", "?"), schema.message("assistant", "!")]
    parts = [
        pa.Table.from_pylist([schema.make_row(turns) | {"id": i} for i in ids], schema=schema.ROW)
        for ids in groups
    ]
    found = references._distinct(
        [p.select(["id", "messages", "tools"][: 2 + n % 2]) for n, p in enumerate(parts)]
    )
    assert found["id"].to_pylist() == sorted({i for ids in groups for i in ids})
