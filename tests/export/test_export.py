"""What other trainers get of a version: read back by rules of their own, it is the row again."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from siftline.cli import main
from siftline.export.targets import TARGETS
from siftline.export.write import export
from siftline.rows.native import native_messages, native_tools

SPEC = importlib.util.spec_from_file_location(
    "versions", (Path(__file__).parents[1] / "versions.py")
)
VERSIONS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(VERSIONS)
EVERYTHING = VERSIONS.PLAIN | VERSIONS.REASONED | VERSIONS.TOOLED


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return VERSIONS.make_version(tmp_path_factory.mktemp("mixed") / "mixed", EVERYTHING)


@pytest.fixture(scope="module")
def rows():
    """Rows by id, their messages native and their tools parsed."""
    table = VERSIONS.row_table(EVERYTHING)
    return {
        row["id"]: {
            **row,
            "messages": native_messages(row["messages"]),
            "tools": native_tools(row["tools"]),
        }
        for row in table.to_pylist()
    }


def lines(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def thought(content):
    """Reasoning and the rest of a text that opens with a thought."""
    if not content.startswith("<think>\n"):
        return {}, content
    reasoning, _, rest = content.removeprefix("<think>\n").partition("\n</think>\n\n")
    return {"reasoning_content": reasoning}, rest


def function_call(function):
    return {"type": "function", "function": function}


def bare(messages, *, links=False, ids=False):
    """Messages without what a form has no place for."""
    result = []
    for m in messages:
        kept = {k: v for k, v in m.items() if links or k not in ("tool_call_id", "name")}
        if "tool_calls" in m and not ids:
            kept["tool_calls"] = [
                {k: v for k, v in c.items() if k != "id"} for c in m["tool_calls"]
            ]
        result.append(kept)
    return result


def trained(messages, flags):
    """Numbers of the assistant messages that are not taken out of the loss."""
    pairs = enumerate(zip(messages, flags, strict=True))
    return [i for i, (m, out) in pairs if m["role"] == "assistant" and not out]


def read_openai(line):
    messages = []
    for m in line["messages"]:
        turn = {k: v for k, v in m.items() if k != "weight"}
        if "tool_calls" in m:
            turn["tool_calls"] = [
                {
                    **c,
                    "function": {
                        **c["function"],
                        "arguments": json.loads(c["function"]["arguments"]),
                    },
                }
                for c in m["tool_calls"]
            ]
        messages.append(turn)
    return messages, line.get("tools"), [m.get("weight") == 0 for m in line["messages"]]


def read_axolotl(line):
    messages, _, _ = read_openai(line)
    flags = [m.pop("train", True) is False for m in messages]
    return messages, json.loads(line["tools"]) if "tools" in line else None, flags


def read_swift(line):
    messages, flags = [], []
    for m in line["messages"]:
        assert set(m) <= {"role", "content", "loss"}
        out = m.get("loss") is False
        if m["role"] == "tool_call":
            if messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
                flags.append(out)
            assert flags[-1] == out
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append(function_call(json.loads(m["content"])))
            continue
        reasoning, content = (
            thought(m["content"]) if m["role"] == "assistant" else ({}, m["content"])
        )
        messages.append({"role": m["role"], "content": content, **reasoning})
        flags.append(out)
    return messages, json.loads(line["tools"]) if "tools" in line else None, flags


def read_llamafactory(line):
    messages = []
    for m in line["messages"]:
        assert set(m) == {"role", "content"}
        if m["role"] == "observation":
            parts = m["content"].split("\n</tool_response>\n<tool_response>\n")
            messages += [{"role": "tool", "content": part} for part in parts]
            continue
        reasoning, content = thought(m["content"])
        if m["role"] != "function_call":
            messages.append({"role": m["role"], "content": content, **reasoning})
            continue
        words, mark, rest = content.partition("<tool_call>")
        calls = json.loads(rest.removesuffix("</tool_call>") if mark else words)
        words = words.removesuffix("\n") if mark else ""
        turn = {"role": "assistant", "content": words, **reasoning}
        messages.append({**turn, "tool_calls": [function_call(c) for c in calls]})
    last = len(messages) - 1  # mask_history
    flags = [m["role"] == "assistant" and i < last for i, m in enumerate(messages)]
    return messages, json.loads(line["tools"]) if line["tools"] else None, flags


def read_verl(line):
    parsed = {name: json.loads(line[name]) for name in ("messages", "tools")}
    messages, _, flags = read_last({"messages": parsed["messages"]})
    return messages, parsed["tools"], flags


def read_last(line):
    tools = json.loads(line["tools"]) if "tools" in line else None
    last = len(line["messages"]) - 1
    flags = [m["role"] == "assistant" and i < last for i, m in enumerate(line["messages"])]
    return line["messages"], tools, flags


READERS = {
    "openai": (read_openai, {"links": True, "ids": True}),
    "axolotl": (read_axolotl, {"links": True, "ids": True}),
    "swift": (read_swift, {}),
    "llamafactory": (read_llamafactory, {}),
    "verl": (read_verl, {"links": True, "ids": True}),
    "openrlhf": (read_last, {"links": True, "ids": True}),
    "open-instruct": (read_last, {"links": True, "ids": True}),
}


def test_every_trainer_is_read_back():
    assert set(READERS) == set(TARGETS)


@pytest.mark.parametrize("to", READERS)
def test_conversation_tools_and_loss_are_the_rows(version, rows, tmp_path, to):
    done = export(version, to, tmp_path / "out")
    read, kept = READERS[to]
    left = done.left_out.get("sft", {})
    assert left == ({"tools": len(VERSIONS.TOOLED)} if to == "openrlhf" else {})
    (path,) = (tmp_path / "out").glob("sft.jsonl*" if to != "verl" else "sft.parquet")
    found = lines(path)
    assert len(found) == done.rows["sft"] == len(rows) - sum(left.values())
    for line in found:
        row = rows[line["id"]]
        messages, tools, flags = read(line)
        assert tools == row["tools"]
        assert trained(messages, flags) == [len(messages) - 1]
        if to == "openai" and row["source"] == "parallel":  # ids were made up
            given = [c["id"] for m in messages for c in m.get("tool_calls", ())]
            assert given == [m["tool_call_id"] for m in messages if m["role"] == "tool"]
            messages, kept = bare(messages), {}
        assert bare(messages, **kept) == bare(row["messages"], **kept), row["source"]


@pytest.mark.parametrize("to", READERS)
def test_pairs_and_prompts_arrive(version, tmp_path, to):
    out = tmp_path / "out"
    done = export(version, to, out)
    ask = VERSIONS.configs()["rlvr"]["prompt"].to_pylist()[0]
    good = [{"role": "assistant", "content": "#### 4"}]
    if "preferences" in TARGETS[to].rows:
        (line,) = lines(out / "preferences.jsonl")
        del line["id"]
        bad = {"role": "assistant", "content": "#### 5"}
        assert line == {
            "openai": {
                "input": {"messages": ask},
                "preferred_output": good,
                "non_preferred_output": [bad],
            },
            "llamafactory": {"messages": ask, "chosen": good[0], "rejected": bad},
            "swift": {"messages": [*ask, *good], "rejected_response": "#### 5"},
            "open-instruct": {"chosen": [*ask, *good], "rejected": [*ask, bad]},
        }.get(to, {"prompt": ask, "chosen": good, "rejected": [bad]})
    else:
        assert "preferences" in done.unknown
    if "rlvr" in TARGETS[to].rows:
        (line,) = lines(next(out.glob("rlvr.[jp]*")))
        del line["id"]
        assert line == {
            "openai": {"messages": ask, "reference_answer": "4", "verifier": "math"},
            "swift": {"messages": ask, "solution": "4", "verifier": "math"},
            "verl": {
                "data_source": "siftline/math",
                "prompt": ask,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"id": "r", "verifier": "math"},
            },
            "open-instruct": {
                "messages": [*ask, {"role": "assistant", "content": "4"}],
                "ground_truth": "4",
                "dataset": "math",
            },
        }.get(to, {"prompt": ask, "answer": "4", "verifier": "math"})
    else:
        assert "rlvr" in done.unknown


@pytest.mark.parametrize("to", READERS)
def test_configurations_name_the_files(version, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    done = export(version, to, "out")
    for path in (tmp_path / "out").glob("*.yaml"):
        said = yaml.safe_load(path.read_text())
        text = json.dumps(said)
        data = [
            name for name in done.files if name.startswith(path.stem + ".") and "yaml" not in name
        ]
        assert to == "llamafactory" or f"out/{data[0]}" in text
    if to == "llamafactory":
        info = json.loads((tmp_path / "out/dataset_info.json").read_text())
        for name, entry in info.items():
            assert (tmp_path / "out" / entry["file_name"]).exists()
            assert entry["tags"]["observation_tag"] == "observation"
            kind = name.removeprefix("mixed_")
            said = yaml.safe_load((tmp_path / f"out/{kind}.yaml").read_text())
            assert (said["dataset"], said["dataset_dir"]) == (name, "out")
    if to == "openrlhf":
        assert (tmp_path / "out/sft.args").read_text() == (
            "--data.dataset out/sft.jsonl --data.input_key messages --data.apply_chat_template\n"
        )


def test_turns_that_llamafactory_refuses_are_named(tmp_path):
    message = VERSIONS.message
    odd = {
        "greeting": [message("assistant", "Hi."), VERSIONS.USER, VERSIONS.SAID],
        "two users": [VERSIONS.USER, VERSIONS.USER, VERSIONS.SAID],
        "late system": [VERSIONS.USER, VERSIONS.SYSTEM, VERSIONS.SAID],
    }
    version = VERSIONS.make_version(tmp_path / "odd", odd | VERSIONS.PLAIN)
    done = export(version, "llamafactory", tmp_path / "out")
    assert done.left_out == {"sft": {"turns": len(odd)}}
    assert done.rows["sft"] == len(VERSIONS.PLAIN)
    left = lines(tmp_path / "out/left_out.jsonl")
    assert {(line["kind"], line["reason"]) for line in left} == {("sft", "turns")}
    ids = {line["id"] for line in left} | {line["id"] for line in lines(tmp_path / "out/sft.jsonl")}
    assert ids == set(VERSIONS.row_table(odd | VERSIONS.PLAIN)["id"].to_pylist())


def test_verls_data_set_gives_the_tokens_and_the_loss_of_ours(
    version, rows, tmp_path, monkeypatch, tiny
):
    """Its parent is verl's; here a stand-in of what ours calls, and is called by."""
    import pandas as pd
    import torch
    import trl

    from siftline.scoring.spans import response_span

    template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    tokenizer = tiny.make_tokenizer(template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"

    class Parent:
        messages_key, tools_key, apply_chat_template_kwargs = "messages", "tools", {}

        def _read_files_and_process(self):
            self.dataframe = pd.read_parquet(self.path)
            self.tools = self.dataframe["tools"].tolist()

        def _build_messages(self, example):
            return example["messages"]

        def __getitem__(self, item):
            messages = self._build_messages(self.dataframe.iloc[item].to_dict())
            parts = [
                self._process_single_message(i, m, tools=None if i else self.tools[item])
                for i, m in enumerate(messages)
            ]
            return [torch.cat(part).tolist() for part in list(zip(*parts, strict=True))[:3]]

    path = "verl.utils.dataset.multiturn_sft_dataset"
    for name in ("verl", "verl.utils", "verl.utils.dataset", path):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[path].MultiTurnSFTDataset = Parent
    export(version, "verl", tmp_path / "out")
    space = {}
    exec((tmp_path / "out/verl_dataset.py").read_text(), space)
    data = space["NativeDataset"]()
    data.path, data.tokenizer = tmp_path / "out/sft.parquet", tokenizer
    data._read_files_and_process()
    ours = {row["id"]: row for row in VERSIONS.row_table(EVERYTHING).to_pylist()}
    for number, identity in enumerate(data.dataframe["id"]):
        assert data.messages[number] == rows[identity]["messages"]
        assert data.tools[number] == rows[identity]["tools"]
        row = ours[identity]
        wanted, (start, end) = response_span(tokenizer, row["messages"], tools=row["tools"])
        tokens, mask, attention = data[number]
        assert tokens[:end] == wanted
        assert mask == [0] * start + [1] * (end - start) + [0] * (len(tokens) - end)
        assert attention == [1] * len(tokens)


def test_rewards_of_exported_prompts():
    from siftline.training.rewards import axolotl_prompts, compute_score

    info = {"id": "r", "verifier": "math"}
    assert compute_score("siftline/math", "#### 4", "4", info, more=1) == 1.0
    assert compute_score("siftline/math", "#### 5", "4", info) == 0.0
    row, options = axolotl_prompts(None, dataset_idx=0)
    line = {"id": "r", "prompt": [], "answer": "4", "verifier": "math"}
    assert row(line, tokenizer=None) == {k: v for k, v in line.items() if k != "id"}
    assert options == {"remove_columns": ["id"]}


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    return ended.value.code


def test_the_verb_counts_and_refuses(version, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(version, "--to", "openrlhf", "--out", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == {"sft": 5, "preferences": 1, "rlvr": 1}
    assert said["left_out"] == {"sft": {"tools": 4}}
    assert call(version.parent, "--to", "verl", "--out", tmp_path / "verl") == 0
    assert "preferences             verl has no such training" in capsys.readouterr().out
    for arguments, words in (
        ((version, "--to", "openrlhf", "--out", out), "exists: name a new folder"),
        ((version, "--to", "trl", "--out", tmp_path / "x"), "no trainer 'trl' to export to"),
        ((tmp_path, "--to", "verl", "--out", tmp_path / "x"), "is no published version"),
    ):
        assert call(*arguments) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_export_is_a_function_of_the_version(version, tmp_path):
    for to in TARGETS:
        parts = []
        for place in ("a", "b"):
            out = tmp_path / place / to
            export(version, to, out)
            parts.append(
                {p.name: p.read_bytes().replace(str(out).encode(), b"") for p in out.iterdir()}
            )
        assert parts[0] == parts[1]


def test_pairs_for_swift_take_earlier_turns_out_of_the_loss():
    ask = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "which?"},
        {"role": "user", "content": "this"},
    ]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    made = TARGETS["swift"].rows["preferences"]({"prompt": ask, "chosen": good, "rejected": bad})
    assert made == {
        "messages": [ask[0], {**ask[1], "loss": False}, ask[2], *good],
        "rejected_response": "no",
    }
