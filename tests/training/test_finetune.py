"""Fine-tuning with the real TRL and peft on a tiny model."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.rows import schema
from siftline.rows.verified import AlteredError
from siftline.training.finetune import FineTune, finetune
from siftline.training.schedule import budget_schedule, epochs_schedule, tokenize_rows

FAST = FineTune(learning_rate=3e-3, epochs=6, batch_rows=10, max_length=64, save_steps=100)
LORA = FineTune(
    method="lora", lora_rank=8, learning_rate=2e-2, epochs=6, batch_rows=10, max_length=64
)


def rows(n=20):
    lines = []
    for i in range(n):
        turns = [
            schema.message("user", f"{i}+{i}?"),
            schema.message("assistant", f"It is {2 * i}"),
        ]
        lines.append(schema.make_row(turns))
    return pa.Table.from_pylist(lines, schema=schema.ROW)


def train(base, out, config, data=None, **options):
    options = {"seed": 0, "dataset_version": "demo-0123456789ab", **options}
    return finetune(base, rows() if data is None else data, out, config, **options)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def dies_after(steps):
    def progress(done, total):
        if done == steps:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def full(tiny_model, tmp_path_factory):
    return train(tiny_model, tmp_path_factory.mktemp("full") / "model", FAST)


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    return train(tiny_model, tmp_path_factory.mktemp("lora") / "model", LORA)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_twenty_rows_are_learned(method, request):
    result = request.getfixturevalue(method)
    assert result.steps == result.curve.height == 12
    assert result.curve["loss"][-1] < 0.6 * result.curve["loss"][0]
    assert result.rows == 120
    assert result.curve["loss_tokens"][-1] == result.loss_tokens
    assert result.skipped.is_empty()


def test_the_first_loss_is_the_mean_over_the_response_tokens(tiny, tiny_model, full):
    # Independent of TRL: plain transformers, cross-entropy over the spans of the first step's rows.
    import torch
    from transformers import AutoModelForCausalLM

    tokenized = tokenize_rows(rows(), tiny.make_tokenizer(), 64)
    plan = epochs_schedule(tokenized, epochs=6, batch_rows=10, parts=1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    total, count = 0.0, 0
    for ids, labels in (item.values() for item in plan[0]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != -100).sum())
    assert full.curve["loss"][0] == pytest.approx(total / count, abs=1e-4)
    assert full.curve["loss_tokens"][0] == count


def test_labels_are_the_response_and_its_end_and_nothing_else(tiny):
    tokenizer = tiny.make_tokenizer(bos=True)
    plan = epochs_schedule(
        tokenize_rows(rows(3), tokenizer, 64), epochs=1, batch_rows=3, parts=1, seed=0
    )
    assert len(plan) == 1
    seen = set()
    for ids, labels in (item.values() for item in plan[0]):
        learned = [label for label in labels if label != -100]
        assert labels == [-100] * (len(ids) - len(learned)) + ids[-len(learned) :]
        seen.add(tokenizer.decode(learned))
    assert seen == {f" It is {2 * i}<eos>" for i in range(3)}


def test_the_same_seed_gives_the_same_bytes_whatever_the_order(tiny_model, tmp_path, full):
    again = train(tiny_model, tmp_path / "again", FAST, rows().take(list(range(19, -1, -1))))
    assert weights(again.model_dir) == weights(full.model_dir)
    assert again.curve.equals(full.curve)
    other = train(tiny_model, tmp_path / "other", FAST, seed=1)
    assert weights(other.model_dir) != weights(full.model_dir)


@pytest.mark.parametrize("config", [FAST, LORA], ids=["full", "lora"])
def test_a_killed_run_resumes_to_the_same_weights(tiny_model, tmp_path, config, request):
    whole = request.getfixturevalue(config.method)
    saving = FineTune(**{**config.__dict__, "save_steps": 5})
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path / "m", saving, progress=dies_after(8))
    assert not (tmp_path / "m" / "training.json").exists()
    with pytest.raises(ValueError, match="holds a run with other data"):
        train(tiny_model, tmp_path / "m", saving, rows(19))
    # A checkpoint cut off while it was written is passed over.
    (tmp_path / "m" / "checkpoints" / "checkpoint-7").mkdir()
    steps = []
    resumed = train(
        tiny_model, tmp_path / "m", saving, progress=lambda done, total: steps.append(done)
    )
    assert steps == list(range(6, 13))
    assert resumed.facts["resumed"]
    assert weights(resumed.model_dir) == weights(whole.model_dir)
    assert resumed.curve.equals(whole.curve)
    assert not (tmp_path / "m" / "checkpoints").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "curve.csv", "training.json"])
def test_a_damaged_result_is_neither_found_nor_trained_over(tiny_model, full, tmp_path, file):
    shutil.copytree(full.model_dir, tmp_path / "m")
    path = tmp_path / "m" / file
    raw = bytearray(path.read_bytes())
    for damaged in (bytes(raw[:-1]) + bytes([raw[-1] ^ 4]), bytes(raw[:9]), b""):
        path.write_bytes(damaged)
        with pytest.raises(AlteredError, match=f"{file} .*trained again") as caught:
            train(tiny_model, tmp_path / "m", FAST, progress=dies_after(1))
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == damaged


def test_a_finished_run_is_not_trained_again_and_never_mixed_up(tiny_model, full):
    before = (full.model_dir / "model.safetensors").stat().st_mtime_ns
    again = train(tiny_model, full.model_dir, FAST, progress=dies_after(1))
    assert (full.model_dir / "model.safetensors").stat().st_mtime_ns == before
    assert again.curve.equals(full.curve)
    assert again.facts == full.facts
    with pytest.raises(ValueError, match="holds a run with other data"):
        train(tiny_model, full.model_dir, FAST, seed=1)


def test_a_merged_adapter_is_the_model(tiny_model, lora):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert lora.adapter_dir == lora.model_dir / "adapter"
    merged = AutoModelForCausalLM.from_pretrained(lora.model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.tensor(
        [AutoTokenizer.from_pretrained(lora.model_dir)("Question: 3+3?").input_ids]
    )
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(lora.adapter_dir))(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


def test_the_model_directory_says_what_it_is(tiny_model, full):
    from transformers import AutoTokenizer

    from siftline.scoring.fingerprint import directory_digest

    card = (full.model_dir / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in ("demo-0123456789ab", directory_digest(tiny_model), "| learning_rate | 0.003 |"):
        assert said in card
    assert str(tiny_model) not in card
    assert pl.read_csv(full.model_dir / "curve.csv").columns == [
        "step",
        "loss",
        "learning_rate",
        "loss_tokens",
    ]
    assert (full.model_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((full.model_dir / "training.json").read_text())["facts"]["steps"] == 12
    template = AutoTokenizer.from_pretrained(full.model_dir).chat_template
    assert template is not None
    assert "generation" in template
    assert json.loads((full.model_dir / "config.json").read_text())["use_cache"] is True
    assert {path.name for path in full.model_dir.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "curve.csv",
        "curve.png",
        "skipped.csv",
        "siftline-files.json",
        "training.json",
    }


def test_an_equal_budget_means_equal_steps_and_tokens(tiny_model, tmp_path):
    config = FineTune(loss_tokens=300, steps=4, max_length=64, learning_rate=1e-3)
    results = [
        train(tiny_model, tmp_path / str(n), config, rows(n), dataset_version=f"v{n}")
        for n in (12, 30)
    ]
    assert [result.steps for result in results] == [4, 4]
    for result in results:
        assert 300 - 10 < result.loss_tokens <= 300  # the longest response has 10 tokens
        spent = result.curve["loss_tokens"].diff(null_behavior="ignore").drop_nulls()
        assert spent.max() - spent.min() <= 20


def test_accumulation_changes_no_weight_beyond_rounding(tiny_model, tmp_path, full):
    import torch
    from safetensors.torch import load_file

    split = train(tiny_model, tmp_path / "split", FineTune(**{**FAST.__dict__, "accumulation": 3}))
    assert split.curve["loss"].to_list() == pytest.approx(full.curve["loss"].to_list(), abs=2e-3)
    ours, theirs = (load_file(r.model_dir / "model.safetensors") for r in (split, full))
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert worst < 0.02
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


def test_shards_are_read_and_long_rows_reported(tiny_model, tmp_path):
    long = schema.make_row([schema.message("user", "q"), schema.message("assistant", "x" * 80)])
    table = pa.concat_tables([rows(), pa.Table.from_pylist([long], schema=schema.ROW)])
    files = [tmp_path / "train-00000.parquet", tmp_path / "train-00001.parquet"]
    pq.write_table(table.slice(0, 10), files[0])
    pq.write_table(table.slice(10), files[1])
    result = train(tiny_model, tmp_path / "m", FineTune(epochs=1, max_length=64), files)
    assert result.rows == 20
    assert result.skipped.select("id", "reason", "threshold").rows() == [
        (long["id"], "too_long", 64.0)
    ]
    assert result.facts["skipped"] == {"too_long": 1}
    pq.write_table(table.select(["id"]), files[1])
    with pytest.raises(ValueError, match="no column \\['messages'\\]"):
        train(tiny_model, tmp_path / "n", FAST, files)


def test_a_budget_schedule_is_the_same_on_two_devices(tiny):
    tokenized = tokenize_rows(rows(), tiny.make_tokenizer(), 64)
    one = budget_schedule(tokenized, loss_tokens=400, steps=5, parts=1, seed=0)
    two = budget_schedule(tokenized, loss_tokens=400, steps=5, parts=2, seed=0)
    assert len(two) == 2 * len(one)
    assert one.tokens_by_step().tolist() == two.tokens_by_step().tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "prefix"},
        {"method": "peft"},
        {"peft": {"type": "LOHA"}},
        {"objective": "rlhf"},
        {"prompt_weight": 0.1, "objective": "poft"},
        {"mask_rate": 1.5},
        {"kl_weight": -1.0},
        {"keep": "first"},
        {"report_to": "mlflow"},
        {"eval_steps": 0},
        {"loss_tokens": 100},
        {"steps": 3},
        {"loss_tokens": 0, "steps": 3},
        {"learning_rate": 0.0},
        {"schedule": "wsd"},
        {"warmup_ratio": 1.0},
        {"batch_rows": 0},
    ],
)
def test_a_bad_configuration_is_refused(bad):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(bad.values()))))):
        FineTune(**bad)
