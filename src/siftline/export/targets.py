"""The trainers a version is exported to: how each takes rows, and what it wants beside them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from siftline.export import forms as llamafactory
from siftline.export import forms as rows

SFT, PREFERENCES, RLVR = "sft", "preferences", "rlvr"
KINDS = (SFT, PREFERENCES, RLVR)
VERL_DATASET = "verl_dataset.py"
REWARDS = "siftline.training.rewards"
AXOLOTL_REWARDS = "siftline_rewards"
AXOLOTL_MODULE = f'''"""Prompts and reward of rlvr.jsonl; axolotl imports modules of its folder."""

from {REWARDS} import axolotl_prompts as prompts
from {REWARDS} import verified

__all__ = ["prompts", "verified"]
'''
Convert = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What a configuration says of an export.

    Attributes:
        name: What the data set is called, letters, digits and underscores.
        files: By kind, the paths of its files as the caller gave their folder.
        earlier: Rows with assistant turns before the response.
    """

    name: str
    files: Mapping[str, list[str]]
    earlier: int


@dataclass(frozen=True)
class Target:
    """A trainer.

    Attributes:
        rows: How it takes the rows of each kind; a kind it does not know is left out.
        configuration: Names and texts of the files it wants beside them.
        parquet: Whether it reads Parquet rather than JSON lines.
    """

    rows: Mapping[str, Convert]
    configuration: Callable[[Facts], dict[str, str]]
    parquet: bool = False


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _nothing(facts: Facts) -> dict[str, str]:
    return {}


def _llamafactory(facts: Facts) -> dict[str, str]:
    names = {kind: paths[0].rpartition("/")[2] for kind, paths in facts.files.items()}
    info = llamafactory.configuration(facts.name, names)
    said = {"dataset_info.json": json.dumps(info, indent=2, ensure_ascii=False) + "\n"}
    folder = next(iter(facts.files.values()))[0].rpartition("/")[0]
    for kind, stage in ((SFT, "sft"), (PREFERENCES, "dpo")):
        if kind in facts.files:
            options: dict[str, Any] = {"stage": stage, "dataset_dir": folder}
            options["dataset"] = f"{facts.name}_{kind}"
            if kind == SFT:
                options["mask_history"] = True
            said[f"{kind}.yaml"] = _yaml(options)
    return said


def _axolotl(facts: Facts) -> dict[str, str]:
    said = {}
    for kind, paths in facts.files.items():
        data: dict[str, Any] = {"path": paths[0], "ds_type": "json", "split": "train"}
        options: dict[str, Any] = {"datasets": [data]}
        if kind == SFT:
            data |= {"type": "chat_template", "field_messages": "messages"}
            data |= {"message_field_training": "train"} if facts.earlier else {}
        elif kind == PREFERENCES:
            data |= {"type": "chat_template.default", "field_messages": "prompt"}
            data |= {"field_chosen": "chosen", "field_rejected": "rejected"}
            options["rl"] = "dpo"
        else:
            data["type"] = f"{AXOLOTL_REWARDS}.prompts"
            options |= {"rl": "grpo", "trl": {"reward_funcs": [f"{AXOLOTL_REWARDS}.verified"]}}
            said[f"{AXOLOTL_REWARDS}.py"] = AXOLOTL_MODULE
        said[f"{kind}.yaml"] = _yaml(options)
    return said


def _swift(facts: Facts) -> dict[str, str]:
    said = {}
    for kind, paths in facts.files.items():
        options: dict[str, Any] = {"dataset": paths}
        if kind != SFT:
            options["rlhf_type"] = "dpo" if kind == PREFERENCES else "grpo"
        if kind == RLVR:
            options |= {"reward_funcs": ["accuracy"], "remove_unused_columns": False}
        said[f"{kind}.yaml"] = _yaml(options)
    return said


def _verl(facts: Facts) -> dict[str, str]:
    said = {}
    if SFT in facts.files:
        paths = facts.files[SFT]
        module = f"{paths[0].rpartition('/')[0]}/{VERL_DATASET}"
        keys = {"messages_key": "messages", "tools_key": "tools"}
        data: dict[str, Any] = {"train_files": paths, **keys}
        data["multiturn"] = {"enable": True, **keys}
        custom = {"path": module, "name": "NativeDataset"}
        said["sft.yaml"] = _yaml({"data": {**data, "custom_cls": custom}})
        said[VERL_DATASET] = (files("siftline.export") / VERL_DATASET).read_text(encoding="utf-8")
    if RLVR in facts.files:
        reward = {"path": f"pkg://{REWARDS}", "name": "compute_score"}
        prompts = {"train_files": facts.files[RLVR], "prompt_key": "prompt"}
        data = {**prompts, "return_raw_chat": True}
        said["rlvr.yaml"] = _yaml({"data": data, "custom_reward_function": reward})
    return said


def _openrlhf(facts: Facts) -> dict[str, str]:
    keys = {
        SFT: ("--data.dataset", "--data.input_key messages"),
        PREFERENCES: (
            "--data.dataset",
            "--data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected",
        ),
        RLVR: ("--data.prompt_dataset", "--data.input_key prompt --data.label_key answer"),
    }
    return {
        f"{kind}.args": f"{keys[kind][0]} {paths[0]} {keys[kind][1]} --data.apply_chat_template\n"
        for kind, paths in facts.files.items()
    }


def _open_instruct(facts: Facts) -> dict[str, str]:
    last = {
        SFT: "last_turn_tulu_tokenize_and_truncate_v1",
        PREFERENCES: "preference_tulu_tokenize_and_truncate_v1",
    }
    mixers = {
        SFT: "dataset_mixer_list",
        PREFERENCES: "mixer_list",
        RLVR: "dataset_mixer_list",
    }
    said = {}
    for kind, paths in facts.files.items():
        options: dict[str, Any] = {mixers[kind]: [paths[0], "1.0"]}
        if kind == SFT:
            options["dataset_transform_fn"] = [last[SFT], "sft_tulu_filter_v1"]
        elif kind == PREFERENCES:
            options["transform_fn"] = [last[PREFERENCES], "preference_tulu_filter_v1"]
        said[f"{kind}.yaml"] = _yaml(options)
    return said


TARGETS: dict[str, Target] = {
    "openai": Target(
        {
            SFT: rows.openai_sft,
            PREFERENCES: rows.openai_preferences,
            RLVR: rows.openai_rlvr,
        },
        _nothing,
    ),
    "llamafactory": Target(
        {SFT: llamafactory.sft, PREFERENCES: llamafactory.preferences}, _llamafactory
    ),
    "axolotl": Target(
        {SFT: rows.axolotl_sft, PREFERENCES: rows.axolotl_preferences, RLVR: rows.prompts}, _axolotl
    ),
    "swift": Target(
        {SFT: rows.swift_sft, PREFERENCES: rows.swift_preferences, RLVR: rows.swift_rlvr}, _swift
    ),
    "verl": Target({SFT: rows.verl_sft, RLVR: rows.verl_rlvr}, _verl, parquet=True),
    "open-instruct": Target(
        {
            SFT: rows.open_instruct_sft,
            PREFERENCES: rows.open_instruct_preferences,
            RLVR: rows.open_instruct_rlvr,
        },
        _open_instruct,
    ),
    "openrlhf": Target(
        {SFT: rows.openrlhf_sft, PREFERENCES: rows.pairs, RLVR: rows.prompts}, _openrlhf
    ),
}
"""By the name that `siftline export --to` takes."""
