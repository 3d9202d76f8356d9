"""The dataset card says what works for the version it lies in, and under which condition."""

import importlib.util
import re
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "versions", (Path(__file__).parents[1] / "versions.py")
)
VERSIONS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(VERSIONS)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    shapes = {"plain": VERSIONS.PLAIN, "reasoned": VERSIONS.REASONED, "tooled": VERSIONS.TOOLED}
    return {name: VERSIONS.make_version(root / name, those) for name, those in shapes.items()}


def text(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_plain_versions_name_every_trainer_and_the_condition_of_marks(cards):
    said = text(cards["plain"])
    for words in ("swift sft --dataset FOLDER/data", "dataset_info.json", "type: chat_template"):
        assert words in said
    (line,) = [line for line in said.splitlines() if "assistant_only_loss" in line]
    assert "generation marks" in line
    assert "Messages here have the keys `role`, `content`." in said


@pytest.mark.parametrize("name", ["reasoned", "tooled"])
def test_others_print_no_line_that_would_lose_something(cards, name):
    said = text(cards[name])
    for words in ("swift sft", "dataset_info.json", "assistant_only_loss", '"formatting"'):
        assert words not in said
    assert "siftline export FOLDER --to llamafactory --out DIR" in said
    keys = {"reasoned": "`reasoning_content`", "tooled": "`reasoning_content`, `tool_calls`"}
    assert f"Some messages have {keys[name]}" in said


@pytest.mark.parametrize("name", ["plain", "reasoned", "tooled"])
def test_the_python_of_a_card_runs(cards, name, tiny_model, tmp_path, monkeypatch):
    """Its blocks, one after the other; the trainer takes a step on the model's own template."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    options = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    seen = {}

    class Trainer(trl.SFTTrainer):
        def __init__(self, model, train_dataset):
            super().__init__(
                model, options, train_dataset=train_dataset, processing_class=tokenizer
            )
            seen["rows"] = list(self.train_dataset)
            seen["loss"] = self.train().training_loss

    monkeypatch.setattr(trl, "SFTTrainer", Trainer)
    space = {"FOLDER": str(cards[name]), "MODEL": model}
    blocks = re.findall(r"```python\n(.*?)```", text(cards[name]), flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, space)
    assert len(space["preferences"]) == len(space["rlvr"]) == 1
    assert len(space["train"]) == len(seen["rows"]) == space["frame"].collect().height
    assert 0 < seen["loss"] < 20


def test_trl_sees_the_conversation_and_the_mask_of_ours(cards, tiny, tiny_model, tmp_path):
    import trl
    from transformers import AutoModelForCausalLM

    import siftline
    from siftline.scoring.spans import response_span

    template = (Path(trl.__file__).with_name("chat_templates") / "qwen3.jinja").read_text()
    tokenizer = tiny.make_tokenizer(template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    options = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None
    )
    data = siftline.load(*cards.values(), form="prompt_completion")
    trainer = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer)
    rows = VERSIONS.row_table(VERSIONS.PLAIN | VERSIONS.REASONED | VERSIONS.TOOLED).to_pylist()
    ours = {
        row["id"]: response_span(tokenizer, row["messages"], tools=row["tools"]) for row in rows
    }
    assert len(trainer.train_dataset) == len(ours)
    for identity, line in zip(data["id"], trainer.train_dataset, strict=True):
        tokens, (start, end) = ours[identity]
        assert line["input_ids"][:end] == tokens
        assert line["labels"][start:end] == tokens[start:end]
        assert set(line["labels"][:start]) == {-100}
