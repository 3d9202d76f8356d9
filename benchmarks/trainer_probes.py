"""Runs the data loading of another trainer on an export, and writes what it would train on.

    python trainer_probes.py NAME SOURCE EXPORT TOKENIZER OUT.json

NAME is a function of this file, SOURCE the folder that holds the trainer's package, TOKENIZER a
tokenizer with the chat template. OUT gets one {"tokens", "labels"} a row, in the trainer's order;
-100 is no loss. Nothing of the trainer but its own code decides what they are. `bench_trainers.py`
starts this once a trainer, each with the libraries that trainer pins.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import yaml

LIMIT = 100_000
"""Tokens of the longest row: nothing may be cut here."""


def llamafactory(export, tokenizer):
    """`get_dataset` of stage sft under template qwen3."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.data.loader import get_dataset
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments

    said = yaml.safe_load((export / "sft.yaml").read_text())
    data = DataArguments(
        dataset=said["dataset"],
        dataset_dir=str(export),
        template="qwen3",
        mask_history=said["mask_history"],
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
    module = get_dataset(template, model, data, training, "sft", tokenizer=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in module["train_dataset"]]


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


def swift(export, tokenizer):
    """`load_dataset` and the template qwen3."""
    from swift.dataset import load_dataset
    from swift.template import get_template

    rows, _ = load_dataset(str(export / "sft.jsonl"), strict=True, load_from_cache_file=False)
    tokenizer.model_info = SimpleNamespace(
        max_model_len=LIMIT, task_type="causal_lm", model_dir=str(export), config=None,
        is_moe_model=False, torch_dtype=None,
    )  # fmt: skip
    tokenizer.model_meta = SimpleNamespace(
        is_multimodal=False, template="qwen3", mcore_model_type=None, model_type="qwen3",
        is_reward=False,
    )  # fmt: skip
    template = get_template(tokenizer, template_type="qwen3", agent_template="hermes")
    template.set_mode("train")
    made = [template.encode(row) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in made]


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


def openrlhf(export, tokenizer):
    """`SFTDataset` over the JSON lines."""
    from datasets import load_dataset
    from openrlhf.datasets.sft_dataset import SFTDataset

    rows = load_dataset(
        "json", data_files=str(export / "sft.jsonl"), split="train",
        cache_dir=str(export / ".cache"),
    )  # fmt: skip
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
    name, source, export, folder, out = sys.argv[1:]
    sys.path.insert(0, source)
    from transformers import PreTrainedTokenizerFast

    made = globals()[name](Path(export), PreTrainedTokenizerFast.from_pretrained(folder))
    lines = [{"tokens": list(tokens), "labels": list(labels)} for tokens, labels in made]
    Path(out).write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
