"""Rows from files to a published version: nothing changes, nothing is lost without a word."""

import json

import polars as pl
import pytest

from siftline.assets.shared import build
from siftline.ingest.pool import REJECTED, Pool, notes_of
from siftline.recipe.parse import parse
from siftline.stages import models
from siftline.stages.publish import publish_curated
from siftline.stages.reporting import _inputs, _inputs_said
from siftline.stages.run import run_stage
from siftline.workspace import Workspace

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARTS = [{"type": "text", "text": "Look"}, {"type": "image"}]
ASKED = {"role": "user", "content": "Q of {name}?"}
TOLD = {"role": "assistant", "content": "  A of {name}\n"}
RECORDS = {
    # name: (record, what the row says beside the usual, what is set aside); None: quarantined
    "messages": ({"messages": [ASKED, TOLD], "topic": "t"}, {}, {"topic"}),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": ASKED["content"]},
                {"from": "gpt", "value": TOLD["content"]},
            ]
        },
        {},
        set(),
    ),
    "alpaca": (
        {"instruction": ASKED["content"], "input": "", "output": TOLD["content"]},
        {},
        set(),
    ),
    "completion": ({"prompt": ASKED["content"], "completion": TOLD["content"]}, {}, set()),
    "question": ({"question": ASKED["content"], "answer": TOLD["content"]}, {}, set()),
    "swift": ({"query": ASKED["content"], "response": TOLD["content"]}, {}, set()),
    "llamafactory": (
        {"messages": [{**ASKED, "content": [{"type": "text", "value": ASKED["content"]}]}, TOLD]},
        {},
        set(),
    ),
    "history": (
        {"instruction": ASKED["content"], "output": TOLD["content"], "history": [["q", " a "]]},
        {"before": [("user", "q"), ("assistant", " a ")]},
        set(),
    ),
    "system": (
        {"system_prompt": " S", "question": ASKED["content"], "response": TOLD["content"]},
        {"before": [("system", " S")]},
        set(),
    ),
    "thinking": ({"messages": [ASKED, {**TOLD, "thinking": "hm"}]}, {"reasoning": "hm"}, set()),
    "named": ({"messages": [{**ASKED, "name": "Ann"}, TOLD]}, {"name": "Ann"}, set()),
    "calls": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"},
                ASKED,
                TOLD,
            ]
        },
        {"before": [("user", "q"), ("assistant", ""), ("tool", "1")]},
        set(),
    ),
    "weight": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "bad", "weight": 0},
                ASKED,
                TOLD,
            ]
        },
        {"before": [("user", "q"), ("assistant", "bad")]},
        set(),
    ),
    "arguments": (
        {"messages": [ASKED, TOLD], "chat_template_kwargs": {"enable_thinking": False}},
        {},
        {"chat_template_kwargs"},
    ),
    "text_like": (
        {"prompt": ASKED["content"], "completion": TOLD["content"], "text": "rendered"},
        {},
        {"text"},
    ),
    "kto": ({"prompt": ASKED["content"], "completion": TOLD["content"], "label": True}, {}, set()),
    "bad": (
        {"prompt": ASKED["content"], "completion": TOLD["content"], "label": False},
        "rejected",
        set(),
    ),
    "images": ({"messages": [ASKED, TOLD], "images": ["a.png"]}, "media", set()),
    "parts": ({"messages": [{"role": "user", "content": PARTS}, TOLD]}, "media", set()),
    "masked": ({"messages": [ASKED, TOLD], "loss_mask": [1]}, "loss_mask", set()),
    "weighed": ({"messages": [ASKED, TOLD], "weight": 0.5}, "weight", set()),
    "untrained": ({"messages": [ASKED, {**TOLD, "train": False}]}, "no_loss", set()),
    "unanswered": ({"prompt": ASKED["content"]}, "no_response", set()),
    "earlier": ({"messages": [ASKED, TOLD], "history": [["a", "b"]]}, "history", set()),
}


def quiet(line): ...


def filled(value, name):
    """The record with its name in all texts, so that no two rows are alike."""
    return json.loads(json.dumps(value).replace("{name}", name))


def recipe(folder, model, stages=("duplicates",), **pool):
    spec = {"name": "mixed", "buckets": 2, "max_quarantine": 0.9, **pool}
    spec.setdefault("inputs", [{"path": str(folder)}])
    return parse(
        {
            "name": "through",
            "pool": spec,
            "models": {"base": {"path": str(model), "max_length": 512, "device": "cpu"}},
            "stages": list(stages),
            "budget": {"size": 100, "unit": "rows"},
        }
    )


@pytest.fixture(scope="module")
def through(tmp_path_factory, tiny_model):
    """A workspace, its recipe and what was published of a file for every record."""
    root = tmp_path_factory.mktemp("through")
    (root / "in").mkdir()
    for name, (record, _, _) in RECORDS.items():
        (root / "in" / f"{name}.jsonl").write_text(json.dumps(filled(record, name)))
    made, workspace = recipe(root / "in", tiny_model), Workspace(root)
    build(workspace, made, "mixed", quiet)
    run_stage(workspace, made, "duplicates", quiet)
    return workspace, made, publish_curated(workspace, made)


def test_every_record_is_published_as_it_was_or_stands_where_it_is_counted(through):
    workspace, _, published = through
    pool = Pool(workspace.pool("mixed"))
    rows = {row["source"]: row for row in pool.all_rows().to_pylist()}
    out = pl.read_parquet(published.path / "data" / "*.parquet")
    written = {row["sift_source"]: row["messages"] for row in out.to_dicts()}
    bad = {r["source"] for b in range(2) for r in pool.read(REJECTED, b).to_pylist()}
    faults = {r["file"]: r["reason"] for r in pool.read("quarantine", 0).to_pylist()}
    aside = set()
    for name, (_, wanted, ignored) in RECORDS.items():
        if wanted == "rejected":
            assert name in bad
        elif isinstance(wanted, str):
            assert faults.pop(f"{name}.jsonl") == wanted
        else:
            asked, told = ASKED["content"], TOLD["content"]
            expected = [*wanted.get("before", []), ("user", asked), ("assistant", told)]
            expected = filled(expected, name)
            for messages in (rows[name]["messages"], written.pop(name)):
                assert [[m["role"], m["content"]] for m in messages] == expected
            last, first = rows[name]["messages"][-1], rows[name]["messages"][0]
            assert last["reasoning"] == wanted.get("reasoning")
            assert first["name"] == wanted.get("name")
            assert [m["weight"] for m in rows[name]["messages"]] == [
                0 if m["content"] == "bad" else None for m in rows[name]["messages"]
            ]
        aside |= ignored
    assert not written
    assert not faults
    assert set(pool.manifest.info["set_aside"]) == aside
    tool = rows["calls"]["messages"][2]
    assert (tool["tool_call_id"], tool["name"]) == ("c1", "f")
    assert json.loads(rows["calls"]["messages"][1]["tool_calls"]) == [CALL]


def test_the_run_says_what_was_set_aside_and_why_rows_are_missing(through):
    workspace, made, _ = through
    inputs = _inputs(workspace, made)["mixed"]
    assert inputs["set_aside"] == {"chat_template_kwargs": 1, "text": 1, "topic": 1}
    assert inputs["reasons"]["media"] == 2
    assert inputs["rejected"] == 1
    said = _inputs_said({"mixed": inputs})
    assert (
        said[0] == "pool mixed: set aside, not read: chat_template_kwargs (1), text (1), topic (1)"
    )
    assert any("media 2" in line for line in said)
    assert any("labelled bad, for preference pairs only: 1 rows" in line for line in said)
    read = inputs["rows"] + inputs["rejected"] + inputs["quarantine"]
    assert read == len(RECORDS)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_labelled_responses_make_preference_pairs_and_no_rows(tmp_path, tiny_model):
    (tmp_path / "in").mkdir()
    pairs = [{"prompt": f"Q{i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    write(tmp_path / "in" / "pairs.jsonl", pairs)
    kto = [{"prompt": "K?", "completion": f"k{i}", "label": i < 2} for i in range(5)]
    kto.append({"prompt": "K?", "completion": "k0", "label": False})  # good above, bad here
    kto.append({"prompt": "alone?", "completion": "x", "label": False})
    write(tmp_path / "in" / "kto.jsonl", kto)
    made, workspace = recipe(tmp_path / "in", tiny_model), Workspace(tmp_path)
    pool = build(workspace, made, "mixed", quiet)
    assert pool.manifest.info["contradicting_labels"] == 1
    assert "labelled good and bad, taken as bad: 1 rows" in notes_of(pool.manifest.info)
    run_stage(workspace, made, "duplicates", quiet)
    published = publish_curated(workspace, made)
    train = pl.read_parquet(published.path / "data" / "*.parquet")
    said = sorted(m[-1]["content"] for m in train["messages"].to_list())
    assert said == ["good 0", "good 1", "good 2", "k1"]
    found = pl.read_parquet(published.path / "preferences" / "*.parquet")
    texts = [
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"])
        for r in found.to_dicts()
    ]
    assert sorted(texts)[1:] == [(f"Q{i}?", f"good {i}", f"bad {i}") for i in range(3)]
    assert sorted(texts)[0][:2] == ("K?", "k1")
    assert found["sift_rejected_id"].null_count() == 0
    assert set(found["sift_chosen_id"]) == set(train["id"])


def test_a_pool_of_prompts_is_answered_by_rejection_sampling(
    tmp_path, tiny_model, scripted, tokenizer, monkeypatch
):
    engine = scripted.Scripted("base", tokenizer, scripted.noisy_sampler(0.6))
    monkeypatch.setattr(models, "_opened", lambda spec, head: engine)
    sums = [(3 + 7 * i, 5 + 11 * i) for i in range(12)]
    rows = [
        {
            "messages": [{"role": "user", "content": f"What is {a} + {b}?"}],
            "ground_truth": str(a + b),
            "dataset": "sums",
        }
        for a, b in sums
    ]
    again = {**rows[0], "messages": [{"role": "user", "content": "What is 3 + 5?!"}]}
    write(tmp_path / "rlvr.jsonl", [*rows, again])
    options = {"target": "uniform", "k": 1, "pilot": 4, "cap": 8, "max_new_tokens": 16}
    stages = ["duplicates", {"rejection_sampling": options}, "verify"]
    inputs = [{"path": str(tmp_path / "rlvr.jsonl")}]
    made = recipe(tmp_path, tiny_model, stages, inputs=inputs, holds="prompts", max_quarantine=0.0)
    workspace = Workspace(tmp_path)
    pool = build(workspace, made, "mixed", quiet)
    assert pool.manifest.info["set_aside"] == {"dataset": 13}
    everyone = pool.all_rows().to_pylist()
    answers = {r["answer"]: r for r in everyone if "What" in r["messages"][0]["content"]}
    assert set(answers) == {str(a + b) for a, b in sums}
    for stage in made.stages:
        output, _ = run_stage(workspace, made, stage.name, quiet)
        if stage.name == "duplicates":
            assert (output.accounting.kept, output.accounting.removed) == (12, 1)
            gone = output.all_decisions().filter(outcome="removed")
            kept = {r["prompt_id"] for r in everyone if r["id"] != gone["id"][0]}
        if stage.kind == "rejection_sampling":
            assert output.accounting.removed == 12
            assert set(output.all_decisions()["reason"].drop_nulls()) == {"no_response"}
            assert output.accounting.added >= 10
    train = pl.read_parquet(publish_curated(workspace, made).path / "data" / "*.parquet")
    for row in train.to_dicts():
        prompt, response = row["messages"]
        assert scripted.said(response["content"]) == scripted.truth(prompt["content"])
        assert row["sift_prompt_id"] in kept
        assert row["sift_answer"] in answers
    assert train.height >= 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": ["duplicates"]}, "no rejection_sampling stage answers them"),
        ({"stages": ["verify", "rejection_sampling"]}, "which have no response yet"),
        ({"stages": ["rejection_sampling"], "training": {}}, "no responses to train on"),
        ({"pool.holds": "either"}, "either is for test sets"),
        ({"stages": ["rejection_sampling"], "dev": "prompts"}, "only test sets go without"),
    ],
)
def test_recipes_of_prompts_that_cannot_work_are_refused(changes, says):
    data = {
        "name": "p",
        "pool": {"name": "p", "holds": "prompts", "inputs": [{"path": "x.jsonl"}]},
        "models": {"base": {"path": "m"}},
        "stages": changes.get("stages", ["rejection_sampling"]),
        "budget": {"size": 1, "unit": "rows"},
    }
    if "training" in changes:
        data["training"] = changes["training"]
    if "dev" in changes:
        data["sets"] = {"dev": [{"name": "d", "holds": "prompts", "inputs": [{"path": "y.jsonl"}]}]}
    if "pool.holds" in changes:
        data["pool"]["holds"] = changes["pool.holds"]
    with pytest.raises(ValueError, match=says):
        parse(data)
