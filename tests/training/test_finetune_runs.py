"""Whole runs beyond plain fine-tuning: objectives, adapters, dev loss, failures, two processes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from siftline.rows import schema
from siftline.rows.published import LISTED, record_outputs
from siftline.training.finetune import FineTune, finetune
from siftline.training.material import lay_out, training_passes
from siftline.training.sft import check_sharding, last_checkpoint

BASE = FineTune(learning_rate=3e-3, epochs=2, batch_rows=10, max_length=96, warmup_ratio=0)
PLAIN = ["step", "loss", "learning_rate", "loss_tokens"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small spend their time in waking threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes as long as training; tests of the model directory look at the picture."""
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)


def rows(n=20, start=0):
    lines = []
    for i in range(start, start + n):
        answer = f"It is {2 * i}" + ", and so on and on" * (i % 3)
        turns = [schema.message("user", f"{i}+{i}?"), schema.message("assistant", answer)]
        lines.append(schema.make_row(turns) | {"source": "ab"[i % 4 == 0]})
    return pa.Table.from_pylist(lines, schema=schema.ROW)


def train(base, out, config, data=None, **options):
    options = {"seed": 0, "dataset_version": "demo-0123456789ab", **options}
    return finetune(base, rows() if data is None else data, out, config, **options)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def references(data):
    return {identity: -0.5 - 0.1 * i for i, identity in enumerate(data["id"].to_pylist())}


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    return train(tiny_model, tmp_path_factory.mktemp("plain") / "m", BASE)


EXTRA = {
    "sft_kl": ["ce", "kl"],
    "dft": ["ce", "mean_weight"],
    "asft": ["ce", "kl", "mean_weight"],
    "poft": ["ce", "mean_weight"],
}


@pytest.mark.parametrize("objective", EXTRA)
def test_an_objective_says_more_than_its_loss(tiny_model, tmp_path, plain, objective):
    config = replace(BASE, objective=objective, kl_weight=0.2)
    given = references(rows()) if objective == "poft" else None
    curve = train(tiny_model, tmp_path / "m", config, references=given).curve
    assert curve.columns == ["step", "loss", *EXTRA[objective], *PLAIN[2:]]
    # Before the first update every objective sees the same model.
    assert curve["ce"][0] == pytest.approx(plain.curve["loss"][0], abs=1e-5)
    first, last = curve.row(0, named=True), curve.row(-1, named=True)
    if "kl" in first:
        assert first["kl"] == pytest.approx(0, abs=1e-6)
        assert last["kl"] > 1e-4
    if objective == "sft_kl":
        assert last["loss"] == pytest.approx(last["ce"] + 0.2 * last["kl"], rel=1e-5)
    if objective == "dft":
        assert first["loss"] < first["ce"]
    if objective in ("dft", "asft"):  # its loss may rise while the model learns
        assert last["mean_weight"] > 2 * first["mean_weight"]
    else:
        assert last["loss"] < first["loss"]


def test_the_start_of_an_adapter_is_the_adapter_switched_off(tiny_model, tmp_path):
    config = replace(BASE, method="lora", lora_rank=4, objective="asft", learning_rate=2e-2)
    curve = train(tiny_model, tmp_path / "m", config).curve
    assert curve["kl"][0] == pytest.approx(0, abs=1e-6)
    assert curve["kl"][-1] > 1e-3
    assert curve["ce"][-1] < curve["ce"][0]


@pytest.mark.parametrize(
    "more",
    [
        {"accumulation": 3},
        {"accumulation": 2, "objective": "asft"},
        {"accumulation": 3, "objective": "poft"},
        {"accumulation": 2, "prompt_weight": 0.3, "source_balance": 1.0},
        {"packing": False},
        {"gradient_checkpointing": True, "objective": "dft"},
    ],
    ids=lambda more: "-".join(map(str, more)),
)
def test_how_a_step_is_cut_changes_no_loss(tiny_model, tmp_path, more):
    given = references(rows()) if more.get("objective") == "poft" else None
    same = {k: v for k, v in more.items() if k in ("objective", "prompt_weight", "source_balance")}
    config = replace(BASE, epochs=1, learning_rate=1e-4, **same)
    one = train(tiny_model, tmp_path / "one", config, references=given)
    other = train(tiny_model, tmp_path / "other", replace(config, **more), references=given)
    for name in one.curve.columns:
        expected = pytest.approx(one.curve[name].to_list(), rel=2e-5, abs=1e-6)
        assert other.curve[name].to_list() == expected, name
    packed = "packing is off" if more.get("packing") is False else "yes"
    assert (one.facts["packed"], other.facts["packed"]) == ("yes", packed)


def test_prompt_weight_and_balance_are_the_means_they_claim(tiny, tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = replace(BASE, epochs=1, batch_rows=20, prompt_weight=0.3, source_balance=1.0)
    loss = train(tiny_model, tmp_path / "m", config).curve["loss"][0]
    tokenizer = tiny.make_tokenizer()
    schedule = lay_out(tokenizer, rows(), config, 0, 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    source = dict(zip(rows()["id"].to_pylist(), rows()["source"].to_pylist(), strict=True))
    spent = {"a": 0, "b": 0}
    for position, identity in enumerate(schedule.rows.ids):
        spent[source[identity]] += schedule.rows.loss_tokens[position]
    total = weight = 0.0
    for position, identity in enumerate(schedule.rows.ids):
        tokens, start = schedule.rows.row(position)
        ids = torch.tensor(tokens.astype(np.int64))
        with torch.no_grad():
            ce = torch.nn.functional.cross_entropy(
                model(ids[None]).logits[0, :-1], ids[1:], reduction="none"
            )
        w = torch.where(torch.arange(1, len(ids)) < start, 0.3, 1.0) / spent[source[identity]]
        total, weight = total + float((w * ce).sum()), weight + float(w.sum())
    assert loss == pytest.approx(total / weight, rel=1e-5)


def test_masked_thought_begins_as_plain_fine_tuning_and_departs(tiny_model, tmp_path, plain):
    hardly = train(tiny_model, tmp_path / "hardly", replace(BASE, mask_rate=1e-12))
    assert weights(hardly.model_dir) == weights(plain.model_dir)
    assert hardly.curve.drop("mask_rate").equals(plain.curve)
    masked = train(tiny_model, tmp_path / "masked", replace(BASE, mask_rate=0.4))
    assert masked.curve["mask_rate"].to_list() == pytest.approx([0, 0.15, 0.3, 0.4])
    assert masked.curve["loss"][0] == plain.curve["loss"][0]
    assert masked.curve["loss"][-1] != plain.curve["loss"][-1]


def test_masked_thought_swaps_inputs_never_labels(tiny):
    tokenizer = tiny.make_tokenizer()
    config = replace(BASE, mask_rate=1.0)
    schedule = lay_out(tokenizer, rows(), config, 0, 1)
    passes = training_passes(schedule, rows(), tokenizer, config, 0, None)
    number = len(passes) - 1
    for position in schedule.passes[number]:
        tokens, labels, _ = passes.row(number, int(position))
        plain, start = schedule.rows.row(int(position))
        assert (tokens[:start] == plain[:start]).all()
        assert tokens[-1] == plain[-1] == tokenizer.eos_token_id
        assert (labels[start:] == plain[start:]).all()
        assert (tokens[start:-1] != plain[start:-1]).mean() > 0.5


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"type": "ia3", "target_modules": ["k_proj", "v_proj", "down_proj"],
         "feedforward_modules": ["down_proj"]},
        {"type": "LORA", "r": 4, "use_dora": True, "target_modules": "all-linear"},
        {"type": "LORA", "r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"},
    ],
    ids=["loha", "ia3", "dora", "pissa"],
)  # fmt: skip
def test_any_adapter_that_merges_can_be_trained(tiny_model, tmp_path, plain, peft):
    config = replace(BASE, method="peft", peft=peft, learning_rate=2e-2)
    result = train(tiny_model, tmp_path / "m", config)
    assert result.curve["loss"][0] == pytest.approx(plain.curve["loss"][0], abs=1e-3)
    assert result.curve["loss"][-1] < result.curve["loss"][0]
    assert (result.adapter_dir is None) == (peft.get("init_lora_weights") == "pissa")
    again = train(result.model_dir, tmp_path / "n", replace(BASE, epochs=0.5, learning_rate=1e-9))
    assert again.curve["loss"][0] < plain.curve["loss"][0], "the merged weights are not trained"


def test_qlora_needs_its_library(tiny_model, tmp_path):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs bitsandbytes, which is not installed"):
            train(tiny_model, tmp_path / "m", replace(BASE, method="qlora"))
    else:
        result = train(
            tiny_model, tmp_path / "m", replace(BASE, method="qlora", learning_rate=2e-2)
        )
        assert result.curve["loss"][-1] < result.curve["loss"][0]


# ---- dev loss -------------------------------------------------------------------------------

WATCHED = replace(BASE, epochs=4, eval_steps=3, save_steps=2)


def dev_loss(model_dir, data, tokenizer, config=WATCHED):
    """Cross-entropy per response token, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    schedule = lay_out(tokenizer, data, replace(config, epochs=1), 0, 1)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    total = count = 0.0
    for position in range(len(schedule.rows.ids)):
        tokens, start = schedule.rows.row(position)
        ids = torch.tensor(tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, start - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum"))
        count += len(ids) - start
    return total / count


def test_dev_loss_is_that_of_the_dev_rows(tiny, tiny_model, tmp_path):
    dev = rows(7, start=50)
    result = train(tiny_model, tmp_path / "m", WATCHED, dev=dev)
    curve = result.curve
    assert curve.columns == ["step", "loss", "dev_loss", *PLAIN[2:]]
    assert curve.filter(pl.col("dev_loss").is_not_null())["step"].to_list() == [3, 6, 8]
    expected = dev_loss(result.model_dir, dev, tiny.make_tokenizer())
    assert curve["dev_loss"][-1] == pytest.approx(expected, rel=1e-5)
    unwatched = train(tiny_model, tmp_path / "n", WATCHED)
    assert weights(unwatched.model_dir) == weights(result.model_dir), "looking changed the weights"
    with pytest.raises(ValueError, match="keep is 'best', but there are no dev rows"):
        train(tiny_model, tmp_path / "o", replace(WATCHED, keep="best"))


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing of it is handled."""


def test_the_best_weights_are_kept_and_a_killed_run_keeps_the_same(tiny, tiny_model, tmp_path):
    # The dev row has the letters of the others, in words that they unlearn.
    config = replace(WATCHED, keep="best", learning_rate=0.05, schedule="constant", eval_steps=1)
    turns = [schema.message("user", "6*6?"), schema.message("assistant", "Is it? " * 5)]
    dev = pa.Table.from_pylist([schema.make_row(turns)], schema=schema.ROW)
    whole = train(tiny_model, tmp_path / "m", config, dev=dev)
    best = whole.curve.sort("dev_loss", "step")["step"][0]
    assert whole.facts["kept_step"] == best < whole.steps
    expected = dev_loss(whole.model_dir, dev, tiny.make_tokenizer())
    assert whole.curve["dev_loss"].min() == pytest.approx(expected, rel=1e-5)

    def dies(done, total):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_model, tmp_path / "n", config, dev=dev, progress=dies)
    resumed = train(tiny_model, tmp_path / "n", config, dev=dev)
    assert resumed.facts["resumed"]
    assert resumed.curve.equals(whole.curve)
    assert resumed.facts["kept_step"] == best
    assert weights(resumed.model_dir) == weights(whole.model_dir)


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
torch.set_num_threads(1)
from siftline.training.finetune import FineTune, finetune

def die(done, total):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

config = FineTune(
    learning_rate=3e-3, epochs=4, batch_rows=10, max_length=96, warmup_ratio=0, eval_steps=3,
    save_steps=2, objective="asft", mask_rate=0.2,
)
base, data, dev, out = map(Path, sys.argv[1:])
finetune(base, [data], out, config, seed=0, dataset_version="v", dev=[dev], progress=die)
"""


def test_a_run_ended_by_sigkill_goes_on_to_the_same_curve(tiny_model, tmp_path):
    import pyarrow.parquet as pq

    files = [tmp_path / "data.parquet", tmp_path / "dev.parquet"]
    for path, table in zip(files, (rows(), rows(7, start=50)), strict=True):
        pq.write_table(table, path)
    arguments = [tiny_model, *files, tmp_path / "killed"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr[-2000:]
    assert not (tmp_path / "killed" / "training.json").exists()
    config = replace(WATCHED, objective="asft", mask_rate=0.2)
    seen = []
    resumed = train(
        tiny_model, tmp_path / "killed", config, files[:1], dev=files[1:],
        dataset_version="v", progress=lambda step, total: seen.append(step),
    )  # fmt: skip
    whole = train(
        tiny_model, tmp_path / "whole", config, files[:1], dev=files[1:], dataset_version="v"
    )
    assert seen == [5, 6, 7, 8]
    assert resumed.curve.equals(whole.curve)
    assert weights(resumed.model_dir) == weights(whole.model_dir)


# ---- failures --------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tiny_model, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from siftline.training import sft as methods

    models, load = [], methods.load_model

    def loading(*arguments):
        models.append(load(*arguments))
        return models[-1]

    monkeypatch.setattr(methods, "load_model", loading)
    config = replace(BASE, epochs=3, save_steps=1)

    def poison(done, total):
        if done == 2:
            import gc

            (model,) = (m for m in gc.get_objects() if type(m).__name__ == "PlannedTrainer")
            with torch.no_grad():
                model.model.lm_head.weight[0, 0] = float("nan")

    said = r"loss is nan at step 3: lower learning_rate \(0.003\).*kept in .*: checkpoint-1"
    with pytest.raises(ValueError, match=said):
        train(tiny_model, tmp_path / "m", config, progress=poison)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "m" / "checkpoints" / "checkpoint-1")
    assert all(torch.isfinite(part).all() for part in kept.parameters())
    assert not (tmp_path / "m" / "training.json").exists()


@pytest.mark.parametrize(
    "error", ["OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory"]
)
def test_out_of_memory_names_the_remedy(tiny_model, tmp_path, monkeypatch, error):
    import torch

    from siftline.training.trainer import PlannedTrainer

    def exhausted(*_, **__):
        raise getattr(torch, error, RuntimeError)(error)

    monkeypatch.setattr(PlannedTrainer, "_score", exhausted)
    said = (
        r"a forward pass has up to \d+ tokens: set gradient_checkpointing and go on, or in a new "
        r"folder raise accumulation \(now 1\), or lower"
    )
    with pytest.raises(ValueError, match=said):
        train(tiny_model, tmp_path / "m", BASE)
    monkeypatch.undo()
    monkeypatch.setattr("siftline.training.finetune.draw_curve", lambda *_: None)
    went_on = train(tiny_model, tmp_path / "m", replace(BASE, gradient_checkpointing=True))
    assert went_on.steps == 4


def test_the_frozen_start_is_not_copied_from_weights_that_are_not_there(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_sharding(replace(BASE, objective="asft"))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    check_sharding(BASE)
    check_sharding(replace(BASE, objective="asft", method="lora"))
    with pytest.raises(ValueError, match="set fsdp_cpu_ram_efficient_loading to false"):
        train(tiny_model, tmp_path / "m", replace(BASE, objective="asft"))


def test_several_gpus_and_one_process_are_refused_before_loading(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process: set CUDA_VISIBLE"):
        train(tiny_model, tmp_path / "m", BASE)


def test_all_have_their_weights_before_the_checkpoints_go(tiny_model, tmp_path, monkeypatch):
    from accelerate import Accelerator

    from siftline.training import sft as methods
    from siftline.training.trainer import PlannedTrainer

    told = []

    def telling(owner, name):
        plain = getattr(owner, name)

        def called(*arguments, **options):
            told.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    telling(PlannedTrainer, "keep")
    telling(Accelerator, "wait_for_everyone")
    telling(methods, "export")
    train(tiny_model, tmp_path / "m", replace(BASE, epochs=0.5))
    after = told[told.index("keep") :]
    assert after[:3] == ["keep", "wait_for_everyone", "export"]


def test_a_checkpoint_whose_state_is_cut_off_is_passed_over(tmp_path):
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_st'), (15, "")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) is None  # nothing says that they are whole
    record_outputs(tmp_path / "checkpoint-5")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


STOPPED = replace(BASE, epochs=4, save_steps=2)


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory):
    """A run that ended in its sixth step, with two checkpoints."""
    out = tmp_path_factory.mktemp("stopped") / "m"

    def dies(done, total):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_model, out, STOPPED, progress=dies)
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 2
    return out


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", LISTED])
def test_a_damaged_checkpoint_is_told_and_not_gone_on_from(
    file, stopped, tmp_path, caplog, mini_tools
):
    for name, damage in mini_tools.beside("test_verified").DAMAGE.items():
        checkpoints = tmp_path / name
        shutil.copytree(stopped / "checkpoints", checkpoints)
        first, last = sorted(checkpoints.glob("checkpoint-*"))
        assert last_checkpoint(checkpoints) == last
        before = (last / file).read_bytes()
        damage(last / file, last / "trainer_state.json", first / file)
        if (last / file).exists() and (last / file).read_bytes() == before:
            continue  # nothing was drawn between the two
        caplog.clear()
        assert last_checkpoint(checkpoints) == first, name
        if (last / LISTED).exists():
            assert f"{last.name}/" in caplog.text
            assert "passed over" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, tiny_model, tmp_path):
    shutil.copytree(stopped, tmp_path / "m")
    first, last = sorted((tmp_path / "m" / "checkpoints").glob("checkpoint-*"))
    raw = bytearray((last / "model.safetensors").read_bytes())
    raw[-4] ^= 1
    (last / "model.safetensors").write_bytes(raw)
    seen = []
    resumed = train(
        tiny_model, tmp_path / "m", STOPPED, progress=lambda step, total: seen.append(step)
    )
    assert seen[0] == int(first.name.rpartition("-")[2]) + 1
    whole = train(tiny_model, tmp_path / "whole", STOPPED)
    assert resumed.curve.equals(whole.curve)
    assert weights(resumed.model_dir) == weights(whole.model_dir)


def test_balanced_sources_of_poft_have_equal_rows_not_tokens(tiny):
    config = replace(BASE, epochs=1, source_balance=1.0, objective="poft")
    tokenizer, known = tiny.make_tokenizer(), references(rows())
    schedule = lay_out(tokenizer, rows(), config, 0, 1)
    passes = training_passes(schedule, rows(), tokenizer, config, 0, known)
    source = dict(zip(rows()["id"].to_pylist(), rows()["source"].to_pylist(), strict=True))
    sums = {"a": 0.0, "b": 0.0}
    for identity, weight in zip(schedule.rows.ids, passes.row_weights, strict=True):
        sums[source[identity]] += weight
    assert sums["a"] == pytest.approx(sums["b"])
    assert sum(sums.values()) == pytest.approx(20)


def test_the_card_says_what_was_learned_and_with_which_template(tiny_model, tmp_path):
    config = replace(BASE, epochs=0.5, objective="dft", prompt_weight=0.25, source_balance=0.5)
    result = train(tiny_model, tmp_path / "m", config)
    card = " ".join((result.model_dir / "README.md").read_text().split())
    assert "The loss is cross-entropy times the token's own probability (DFT)" in card
    assert "and with weight 0.25 on all that stands before it; sources are evened out" in card
    assert "The base model has no chat template" in card
    assert result.facts["template"] == "question_answer"
    own = train(result.model_dir, tmp_path / "n", replace(config, prompt_weight=0.0))
    assert "its end only;" in " ".join((own.model_dir / "README.md").read_text().split())


def test_a_weight_of_three_is_three_rows(tiny_model, tmp_path):
    """The same text from three sources is three rows: one of weight 3 moves the model as they."""
    import torch
    from safetensors.torch import load_file

    def made(i, source):
        turns = [schema.message("user", f"{i}+{i}?"), schema.message("assistant", f"It is {2 * i}")]
        return schema.make_row(turns, source=source)

    once = pa.Table.from_pylist([made(i, "a") for i in range(4)], schema=schema.ROW)
    first = once["id"].to_pylist().index(made(0, "a")["id"])
    weights_ = [3.0 if i == first else None for i in range(4)]
    weighted = once.append_column("sift_weight", pa.array(weights_, pa.float64()))
    more = pa.Table.from_pylist([made(0, "b"), made(0, "c")], schema=schema.ROW)
    config = replace(BASE, epochs=1, batch_rows=6, learning_rate=1e-2)
    states, losses = [], []
    for name, data in (("w", weighted), ("r", pa.concat_tables([once, more])), ("p", once)):
        done = train(tiny_model, tmp_path / name, config, data)
        states.append(load_file(done.model_dir / "model.safetensors"))
        losses.append(done.curve["loss"].to_list())
        assert done.steps == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-4) for k in states[0])
    ignored = train(tiny_model, tmp_path / "i", replace(config, weight_column=None), weighted)
    assert ignored.curve["loss"].to_list() == losses[2]


def test_what_rehydration_writes_is_what_training_reads(tmp_path):
    import json

    from click.testing import CliRunner

    from siftline.cli import cli
    from siftline.training.material import read_rows, row_weights

    text = "In the morning the baker of the old town sells warm bread to all who pass by"
    lines = [
        {"question": f"What does {who} sell?", "response": f"{text}, says {who}."}
        for who in ("anna", "berta", "berta", "berta")
    ]
    lines.append({"question": "Two and two?", "response": "That makes four, as it always did."})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["dedup", str(tmp_path / "x.jsonl"), "--rehydrate", "--out", str(tmp_path / "d")]
    ran = CliRunner().invoke(cli, asked)
    assert ran.exit_code == 0, ran.output
    (file,) = (tmp_path / "d" / "data").iterdir()
    wrote = pl.read_parquet(file)
    assert sorted(wrote["sift_weight"].to_list()) != [1] * wrote.height
    table = read_rows([file], FineTune())
    ids = table["id"].to_pylist()
    found = row_weights(table, ids, "sift_weight")
    said = dict(zip(wrote["response"].to_list(), wrote["sift_weight"].to_list(), strict=True))
    responses = [turns[-1]["content"] for turns in table["messages"].to_pylist()]
    assert found.tolist() == [float(said[r]) for r in responses]
    bare = read_rows([file], FineTune(weight_column=None))
    assert "sift_weight" not in bare.column_names


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(tiny_model, tmp_path, value):
    data = rows(4)
    data = data.append_column("sift_weight", pa.array([1.0, value, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"has sift_weight .*give a number above 0"):
        train(tiny_model, tmp_path / "m", BASE, data)


def test_missing_columns_and_libraries_are_named(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no column 'mean_ref_logprob'"):
        train(tiny_model, tmp_path / "m", replace(BASE, objective="poft"))
    bare = rows().select(["id", "messages"])
    with pytest.raises(ValueError, match="no column 'source'"):
        train(tiny_model, tmp_path / "m", replace(BASE, source_balance=1.0), bare)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to is 'wandb': install wandb"):
        train(tiny_model, tmp_path / "m", replace(BASE, report_to="wandb"))


def test_tensorboard_is_told_of_every_step(tiny_model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(BASE, report_to="tensorboard", objective="dft")
    result = train(tiny_model, tmp_path / "m", config)
    events = EventAccumulator(str(result.model_dir / "runs"))
    events.Reload()
    told = [event.value for event in events.Scalars("train/ce")]
    assert told == pytest.approx(result.curve["ce"].to_list(), rel=1e-6)


def test_reference_scores_come_from_a_column_or_a_mapping(tiny_model, tmp_path):
    config = replace(BASE, epochs=1, objective="poft", reference_column="scored")
    known = references(rows())
    column = pa.array([known[i] for i in rows()["id"].to_pylist()])
    one = train(tiny_model, tmp_path / "a", config, rows().append_column("scored", column))
    other = train(tiny_model, tmp_path / "b", config, rows(), references=known)
    assert weights(one.model_dir) == weights(other.model_dir)


# ---- two processes ---------------------------------------------------------------------------

OBJECTIVES = ("asft", "poft")
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from siftline.training import finetune as module
from siftline.training.finetune import FineTune, finetune
module.draw_curve = lambda *_: None
base, data, dev, out, *objectives = sys.argv[1:]
for objective in objectives:
    config = FineTune(
        learning_rate=3e-3, epochs=2, batch_rows=10, max_length=96, warmup_ratio=0,
        objective=objective, eval_steps=2, reference_column="scored",
    )
    finetune(
        Path(base), [Path(data)], Path(out, objective), config,
        seed=0, dataset_version="v", dev=[Path(dev)],
    )
"""


@pytest.mark.slow
def test_two_processes_give_the_update_of_one(tiny_model, tmp_path):
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file

    known = references(rows())
    column = pa.array([known[i] for i in rows()["id"].to_pylist()])
    data, dev = rows().append_column("scored", column), rows(7, start=50)
    pq.write_table(data, tmp_path / "data.parquet")
    pq.write_table(dev, tmp_path / "dev.parquet")
    (tmp_path / "child.py").write_text(CHILD)
    places = [tmp_path / name for name in ("child.py", "data.parquet", "dev.parquet", "two")]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0",
            str(places[0]), str(tiny_model), *map(str, places[1:]), *OBJECTIVES,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for objective in OBJECTIVES:
        two = tmp_path / "two" / objective
        config = replace(BASE, objective=objective, eval_steps=2, reference_column="scored")
        one = train(tiny_model, tmp_path / objective, config, data, dev=dev)
        curve = pl.read_csv(two / "curve.csv")
        assert curve.columns == one.curve.columns
        for name in curve.columns:
            values = pytest.approx(one.curve[name].fill_null(0).to_list(), rel=1e-4)
            assert curve[name].fill_null(0).to_list() == values, (objective, name)
        ours, theirs = (load_file(m / "model.safetensors") for m in (one.model_dir, two))
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4)
