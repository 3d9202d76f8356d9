"""What other people's readers make of a published version."""

import json

import duckdb
import polars as pl
import pytest


@pytest.fixture
def version(finished):
    return (finished.root / "curated" / "mini" / "latest").resolve()


@pytest.fixture
def rows(version):
    return json.loads((version / "manifest.json").read_text())["counts"]["rows"]


def test_datasets_loads_both_configs(version, rows, tmp_path):
    from datasets import load_dataset

    train = load_dataset(str(version), split="train", cache_dir=str(tmp_path))
    assert len(train) == rows > 20
    assert {"id", "messages", "sift_logprob_mean", "sift_cluster"} <= set(train.column_names)
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant"]
    removed = load_dataset(str(version), "removed", split="train", cache_dir=str(tmp_path))
    assert {"id", "stage", "reason", "matched_id"} <= set(removed.column_names)
    assert set(train["id"]).isdisjoint(removed["id"])
    stream = load_dataset(str(version), split="train", streaming=True)
    assert sum(1 for _ in stream) == rows


def test_polars_and_duckdb_read_the_same(version, rows):
    frame = pl.read_parquet(version / "data" / "*.parquet")
    assert frame.height == rows
    glob = version / "data" / "*.parquet"
    count, ids, mean = duckdb.execute(
        f"select count(*), count(distinct id), avg(sift_n_tokens) from '{glob}'"
    ).fetchone()
    assert (count, ids) == (rows, frame["id"].n_unique())
    assert mean == pytest.approx(frame["sift_n_tokens"].mean())
    last = duckdb.execute(
        f"select messages[-1].content from '{glob}' order by id limit 1"
    ).fetchone()
    assert last[0] == frame.sort("id")["messages"][0][-1]["content"]


def test_the_trainer_takes_a_step_on_it(version, rows, tiny_model, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from siftline.scoring.templates import QUESTION_ANSWER

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = QUESTION_ANSWER
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = model.get_input_embeddings().weight.detach().clone()
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        assistant_only_loss=True,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = load_dataset(str(version), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == rows
    result = trainer.train()
    assert result.global_step == 1
    assert 0 < result.training_loss < 20
    assert not before.equal(trainer.model.get_input_embeddings().weight.detach())
