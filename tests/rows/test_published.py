"""What other people's readers make of a published version."""

import json
from dataclasses import replace

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


def loaded(version, config, tmp_path):
    from datasets import load_dataset

    return load_dataset(str(version), config, split="train", cache_dir=str(tmp_path / "cache"))


def trained(trainer_class, config_class, model, data, tmp_path, options, **arguments):
    """One step of a TRL trainer on a config as it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from siftline.scoring.templates import QUESTION_ANSWER

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = QUESTION_ANSWER
    settings = config_class(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    policy = AutoModelForCausalLM.from_pretrained(model)
    trainer = trainer_class(
        model=policy, args=settings, train_dataset=data, processing_class=tokenizer, **arguments
    )
    return trainer, trainer.train()


def test_preference_pairs_hold_a_right_answer_against_a_wrong_one(version, tmp_path):
    from siftline.scoring.verifiers import verify_math

    pairs = loaded(version, "preferences", tmp_path)
    assert len(pairs) > 0
    for line in pairs:
        assert [m["role"] for m in line["prompt"]] == ["user"]
        chosen, rejected = line["chosen"][0], line["rejected"][0]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert verify_math(chosen["content"], line["sift_answer"]).correct is True
        assert verify_math(rejected["content"], line["sift_answer"]).correct is False
    assert len(set(pairs["id"])) == len(pairs)


def test_the_preference_trainer_takes_a_step_on_them(version, tiny_model, tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = loaded(version, "preferences", tmp_path)
    options = {"per_device_train_batch_size": 2, "max_length": 256}
    _, result = trained(DPOTrainer, DPOConfig, tiny_model, pairs, tmp_path, options)
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)  # log 2: policy = reference


def test_verifiable_prompts_are_solved_sometimes_and_train_by_their_verifier(
    version, tiny_model, tmp_path
):
    from trl import GRPOConfig, GRPOTrainer

    from siftline.training.rewards import verified

    prompts = loaded(version, "rlvr", tmp_path)
    assert len(prompts) > 0
    assert all(0 < rate < 1 for rate in prompts["pass_rate"])
    assert set(prompts["verifier"]) == {"math"}
    asked = []

    def watched(completions, answer, verifier, **columns):
        asked.append((len(completions), set(verifier)))
        right = [[{"role": "assistant", "content": f"#### {a}"}] for a in answer]
        assert verified(right, answer, verifier) == [1.0] * len(answer)
        return verified(completions, answer, verifier, **columns)

    options = {
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 6,
    }
    _, result = trained(
        GRPOTrainer, GRPOConfig, tiny_model, prompts, tmp_path, options, reward_funcs=watched
    )
    assert result.global_step == 1
    assert asked == [(2, {"math"})]


def test_a_stage_without_draws_or_refuted_draws_gives_empty_configs(finished, mini):
    from siftline.stages.publish import final_context, sample_bank
    from siftline.stages.run import outputs
    from siftline.workspace import Workspace

    recipe = mini()
    workspace = Workspace(finished.root)
    context = final_context(workspace, recipe, outputs(workspace, recipe))
    whole = sample_bank(context)
    assert min(table.num_rows for table in whole.values()) > 0

    class Without:
        """A stage's output whose side tables had no line, and so were not written."""

        def __init__(self, output):
            self.output = output

        def __getattr__(self, name):
            return getattr(self.output, name)

        def table(self, name):
            return None

    bare = replace(context, before=[(s, Without(o)) for s, o in context.before])
    assert {name: table.num_rows for name, table in sample_bank(bare).items()} == {
        "preferences": 0, "rlvr": 0,
    }  # fmt: skip
    assert sample_bank(bare)["rlvr"].schema == whole["rlvr"].schema
