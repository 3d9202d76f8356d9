"""Runs the data loading of another trainer on an export, and writes what it would train on.

    python trainer_probes.py NAME KIND SOURCE EXPORT TOKENIZER OUT.json

NAME is a function of this file (with `_preferences` or `_rlvr` behind it for those kinds), SOURCE
the folder that holds the trainer's package, TOKENIZER a tokenizer with the chat template. OUT gets
one line a row, in the trainer's order: of sft tokens and labels, where -100 is no loss; of
preferences those of both responses; of rlvr the templated prompt and the answer that a reward is
given. Nothing of the trainer but its own code decides what they are. `bench_trainers.py` starts
this once a trainer and kind, each with the libraries that trainer pins.
"""

import json
import os
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import yaml

LIMIT = 100_000
"""Tokens of the longest row: nothing may be cut here."""
PAIR = ("chosen", "rejected")


def llamafactory(export, tokenizer):
    """`get_dataset` of stage sft under template qwen3."""
    rows = _llamafactory(export, tokenizer, "sft", "sft")
    return [(row["input_ids"], row["labels"]) for row in rows]


def llamafactory_preferences(export, tokenizer):
    """`get_dataset` of stage rm, which its dpo workflow asks for."""
    rows = _llamafactory(export, tokenizer, "preferences", "rm")
    return [_both(row) for row in rows]


def _both(row):
    return [(row[f"{name}_input_ids"], row[f"{name}_labels"]) for name in PAIR]


def _llamafactory(export, tokenizer, kind, stage):
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.data.loader import get_dataset
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments

    said = yaml.safe_load((export / f"{kind}.yaml").read_text())
    data = DataArguments(
        dataset=said["dataset"],
        dataset_dir=str(export),
        template="qwen3",
        mask_history=said.get("mask_history", False),
        cutoff_len=LIMIT,
        overwrite_cache=True,
    )
    template = get_template_and_fix_tokenizer(tokenizer, data)

    @contextmanager
    def first(**options):
        yield

    training = SimpleNamespace(
        seed=0, local_process_index=0, should_log=False, should_save=False,
        predict_with_generate=False, main_process_first=first,
    )  # fmt: skip
    model = ModelArguments(model_name_or_path="none", cache_dir=str(export / ".cache"))
    module = get_dataset(template, model, data, training, stage, tokenizer=tokenizer)
    return module["train_dataset"]


def axolotl(export, tokenizer):
    """The `chat_template` strategy over the JSON lines."""
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault
    from datasets import load_dataset

    (said,) = yaml.safe_load((export / "sft.yaml").read_text())["datasets"]
    cfg = DictDefault(
        {"sequence_len": LIMIT, "train_on_inputs": False, "eot_tokens": ["<|im_end|>"],
         "chat_template": "tokenizer_default"}
    )  # fmt: skip
    strategy = load(tokenizer, cfg, {**said, "train_on_eot": "turn"})
    rows = load_dataset(
        said["ds_type"], data_files=str(export / "sft.jsonl"), split=said["split"],
        cache_dir=str(export / ".cache"),
    )  # fmt: skip
    made = [strategy.tokenize_prompt(row) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in made]


def axolotl_preferences(export, tokenizer):
    """The transformation that the exported type names, over the JSON lines."""
    from axolotl.prompt_strategies.dpo import load
    from axolotl.utils.dict import DictDefault

    options = yaml.safe_load((export / "preferences.yaml").read_text())
    cfg = DictDefault({**options, "chat_template": "tokenizer_default"})
    change = load(cfg["datasets"][0]["type"], cfg, dataset_idx=0)
    change = change[0] if isinstance(change, tuple) else change
    made = [change(row, tokenizer=tokenizer) for row in _lines(export, "preferences")]
    return [_texts(tokenizer, row["prompt"], row) for row in made]


def axolotl_rlvr(export, tokenizer):
    """The transformation of the module beside the rows, loaded as its GRPO loads one."""
    from axolotl.prompt_strategies.base import load
    from axolotl.utils.dict import DictDefault

    sys.path.insert(0, str(export))
    cfg = DictDefault(yaml.safe_load((export / "rlvr.yaml").read_text()))
    change = load(cfg["datasets"][0]["type"], "axolotl.prompt_strategies.dpo", cfg, dataset_idx=0)
    change = change[0] if isinstance(change, tuple) else change
    made = [change(row, tokenizer=tokenizer) for row in _lines(export, "rlvr")]
    return [(_prompt(tokenizer, row["prompt"]), row["answer"]) for row in made]


def _lines(export, kind):
    from datasets import load_dataset

    return load_dataset(
        "json", data_files=str(export / f"{kind}.jsonl"), split="train",
        cache_dir=str(export / ".cache"),
    )  # fmt: skip


def _prompt(tokenizer, messages):
    """The text that a model is asked with, where the trainer leaves templating to its sampler."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _texts(tokenizer, prompt, row):
    """Tokens and labels of texts that the trainer's collator joins to their prompt."""
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made = []
    for name in PAIR:
        said = tokenizer(row[name], add_special_tokens=False)["input_ids"]
        made.append(([*asked, *said], [-100] * len(asked) + said))
    return made


def swift(export, tokenizer):
    """`load_dataset` and the template qwen3."""
    rows, template = _swift(export, tokenizer, "sft")
    template.set_mode("train")
    made = [template.encode(row) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in made]


def swift_preferences(export, tokenizer):
    """The same in mode rlhf."""
    rows, template = _swift(export, tokenizer, "preferences")
    template.set_mode("rlhf")
    return [_both(template.encode(row)) for row in rows]


def swift_rlvr(export, tokenizer):
    """The same in the mode in which a sampler is asked; its rewards read `solution`."""
    rows, template = _swift(export, tokenizer, "rlvr")
    template.set_mode("transformers")
    made = [(template.encode(row)["input_ids"], row["solution"]) for row in rows]
    return [(tokenizer.decode(tokens), solution) for tokens, solution in made]


def _swift(export, tokenizer, kind):
    from swift.dataset import load_dataset
    from swift.template import get_template

    said = yaml.safe_load((export / f"{kind}.yaml").read_text())
    rows, _ = load_dataset(
        str(export / f"{kind}.jsonl"), strict=True, load_from_cache_file=False,
        remove_unused_columns=said.get("remove_unused_columns", True),
    )  # fmt: skip
    tokenizer.model_info = SimpleNamespace(
        max_model_len=LIMIT, task_type="causal_lm", model_dir=str(export), config=None,
        is_moe_model=False, torch_dtype=None,
    )  # fmt: skip
    tokenizer.model_meta = SimpleNamespace(
        is_multimodal=False, template="qwen3", mcore_model_type=None, model_type="qwen3",
        is_reward=False,
    )  # fmt: skip
    return rows, get_template(tokenizer, template_type="qwen3", agent_template="hermes")


def verl(export, tokenizer):
    """The data set class that the export brings, over verl's own."""
    from importlib.util import module_from_spec, spec_from_file_location

    said = yaml.safe_load((export / "sft.yaml").read_text())["data"]
    spec = spec_from_file_location("verl_dataset", export / "verl_dataset.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {
        "messages_key": said["messages_key"], "tools_key": said["tools_key"],
        "pad_mode": "no_padding", "max_length": LIMIT, "ignore_input_ids_mismatch": True,
    }  # fmt: skip
    kind = getattr(module, said["custom_cls"]["name"])
    rows = kind([str(export / "sft.parquet")], tokenizer, config)
    made = []
    for i in range(len(rows)):
        row = rows[i]
        pairs = zip(row["input_ids"].tolist(), row["loss_mask"].tolist(), strict=True)
        made.append((row["input_ids"].tolist(), [t if keep else -100 for t, keep in pairs]))
    return made


def verl_rlvr(export, tokenizer):
    """`RLHFDataset` over the Parquet file."""
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    said = yaml.safe_load((export / "rlvr.yaml").read_text())["data"]
    options = {"max_prompt_length": LIMIT, "cache_dir": str(export / ".cache")}
    config = OmegaConf.create({**options, **said})
    rows = RLHFDataset([str(export / "rlvr.parquet")], tokenizer, config)
    made = []
    for i in range(len(rows)):
        row = rows[i]
        asked = _prompt(tokenizer, list(row["raw_prompt"]))
        made.append((asked, row["reward_model"]["ground_truth"]))
    return made


def open_instruct(export, tokenizer):
    """The functions that the exported configuration names, over the JSON lines."""
    made = _transformed(export, tokenizer, "sft", "dataset_transform_fn", max_seq_length=LIMIT)
    return [(row["input_ids"], row["labels"]) for row in made]


def open_instruct_preferences(export, tokenizer):
    """The same of its DPO."""
    made = _transformed(export, tokenizer, "preferences", "transform_fn", max_seq_length=LIMIT)
    return [_both(row) for row in made]


def open_instruct_rlvr(export, tokenizer):
    """The functions that its GRPO's `dataset_transform_fn` names by default."""
    names = ["rlvr_tokenize_v1", "rlvr_max_length_filter_v1"]
    made = _transformed(export, tokenizer, "rlvr", names)
    return [(tokenizer.decode(r["input_ids_prompt"]), _one(r["ground_truth"])) for r in made]


def _one(value):
    return value[0] if isinstance(value, list) else value


def _transformed(export, tokenizer, kind, names, **options):
    """What `get_dataset_v1` maps and filters the rows with, in its order."""
    from open_instruct.dataset_transformation import TRANSFORM_FNS

    said = yaml.safe_load((export / f"{kind}.yaml").read_text())
    rows = _lines(export, kind)
    for name in said[names] if isinstance(names, str) else names:
        function, does = TRANSFORM_FNS[name]
        takes = function.__code__.co_varnames[: function.__code__.co_argcount]
        given = {key: value for key, value in options.items() if key in takes}
        given["tokenizer"] = tokenizer
        rows = (
            rows.map(function, fn_kwargs=given)
            if does == "map"
            else rows.filter(function, fn_kwargs=given)
        )
    return rows


def openrlhf_preferences(export, tokenizer):
    """`RewardDataset` as its DPO makes it."""
    from openrlhf.datasets.reward_dataset import RewardDataset

    rows, strategy = _openrlhf(export, "preferences")
    made = RewardDataset(rows, tokenizer, LIMIT, strategy, is_dpo=True, num_processors=1)
    lines = []
    for chosen, _, rejected, _, asked in (made[i] for i in range(len(made))):
        halves = [tokens[0].tolist() for tokens in (chosen, rejected)]
        lines.append([(half, [-100] * asked + half[asked:]) for half in halves])
    return lines


def openrlhf_rlvr(export, tokenizer):
    """`PromptDataset` over the JSON lines."""
    from openrlhf.datasets.prompts_dataset import PromptDataset

    rows, strategy = _openrlhf(export, "rlvr")
    made = PromptDataset(rows, tokenizer, strategy)
    return [made[i][1:3] for i in range(len(made))]


def _openrlhf(export, kind):
    """The rows, and the options of the exported arguments as its data sets read them."""
    words = (export / f"{kind}.args").read_text().split()
    data = {"apply_chat_template": "--data.apply_chat_template" in words}
    for word, value in pairwise(words):
        if word.startswith("--data.") and not value.startswith("--"):
            data[word.removeprefix("--data.")] = value
    args = SimpleNamespace(data=SimpleNamespace(**data))
    return _lines(export, kind), SimpleNamespace(args=args, is_rank_0=lambda: False)


def openrlhf(export, tokenizer):
    """`SFTDataset` over the JSON lines."""
    from openrlhf.datasets.sft_dataset import SFTDataset

    rows = _lines(export, "sft")
    data = SimpleNamespace(input_key="messages", output_key=None, apply_chat_template=True)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data))
    loaded = SFTDataset(rows, tokenizer, LIMIT, strategy, num_processors=1)
    made = []
    for tokens, _, mask in (loaded[i] for i in range(len(loaded))):
        tokens = tokens[0].tolist()
        # Its mask stands at the token before the one that is predicted.
        keep = [0, *mask[0].tolist()[:-1]]
        made.append((tokens, [t if k else -100 for t, k in zip(tokens, keep, strict=True)]))
    return made


def main():
    """Loads the trainer from SOURCE and writes OUT."""
    name, kind, source, export, folder, out = sys.argv[1:]
    sys.path.insert(0, source)
    from transformers import PreTrainedTokenizerFast

    name = name.replace("-", "_") + ("" if kind == "sft" else f"_{kind}")
    made = globals()[name](Path(export), PreTrainedTokenizerFast.from_pretrained(folder))
    if kind == "sft":
        lines = [_line(row) for row in made]
    elif kind == "preferences":
        lines = [[_line(half) for half in row] for row in made]
    else:
        lines = [{"prompt": prompt, "answer": answer} for prompt, answer in made]
    Path(out).write_text(json.dumps(lines))


def _line(row):
    tokens, labels = row
    return {"tokens": list(map(int, tokens)), "labels": list(map(int, labels))}


if __name__ == "__main__":
    main()
