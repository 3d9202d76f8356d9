"""Fine-tuning: siftline's stage beside TRL's SFTTrainer on rows of mixed length, tokens a second.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_training.py [--rows 64] [--rounds 3]
    ... bench_training.py --device cuda --model 1B --rows 512 --batch-rows 64 --peak-tflops 989

A random Llama with float32 weights (on a GPU under bfloat16 autocast), AdamW, 16 rows an optimizer
step, one epoch:

    packed      siftline: rows end to end, no padding
    groups      siftline with packing off: passes of rows of like length
    trl +ckpt   TRL's default: batches of 8, rows in random order, padded, gradient checkpointing.
                What is said about TRL is said about this line
    trl         the same without gradient checkpointing
    trl 1x16    TRL with one row a pass: no padding, the most passes
    trl packed  TRL with packing (best fit, sequences of 1,024 tokens, one a pass) and without
                checkpointing. Without FlashAttention transformers reads the rows' bounds from the
                position ids and masks attention by them, which is exact and pays for the whole
                square; where flash_attn is installed and the device is a GPU, it is taken

Every line of TRL has its fused head, which is always on: it holds no pass's logits whole.

Every contender is a process of its own that trains once on the same rows (on a GPU after a run of
two steps, so that kernels are loaded); one round runs each once. Tokens count what the rows hold,
prompt and response, without padding; seconds are those of the training loop alone. Losses of the
first step are of different rows and are not compared here; tests hold that packed and padded rows
give the same loss. Memory is the largest resident size, on a GPU the most that torch allocated
there. With --peak-tflops a line's share of that rate is 6 x parameters x tokens a second. Medians.
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_scoring import MODELS, make_model

DEFAULT = "trl +ckpt"
CONTENDERS = ("packed", "groups", DEFAULT, "trl", "trl 1x16", "trl packed")
TRL_BATCH = 8
LONGEST = 1024
MODELS["1B"] = (2048, 5632, 22, 32, 4, 32_000, 64)  # TinyLlama's shape


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of words that the tokenizer knows, of log-normal length, median about 150 tokens."""
    from siftline.rows import schema

    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(5.0, 0.8, count)).astype(int), 20, LONGEST - 60)
    rows = []
    for length in lengths:
        words = [f"w{i}" for i in rng.integers(3, 32_000, int(length))]
        cut = max(2, len(words) // 4)
        turns = [
            schema.message("user", " ".join(words[:cut])),
            schema.message("assistant", " ".join(words[cut:])),
        ]
        rows.append(schema.make_row(turns))
    return rows


def ours(base: Path, out: Path, rows: Any, step_rows: int, packing: bool) -> float:
    from siftline.training.finetune import FineTune, finetune

    config = FineTune(
        epochs=1, batch_rows=step_rows, max_length=LONGEST, learning_rate=1e-4, packing=packing
    )
    result = finetune(base, rows, out, config, seed=0, dataset_version="bench")
    assert result.skipped.is_empty(), result.skipped
    assert (result.facts["packed"] == "yes") == packing, result.facts["packed"]
    return float(result.facts["seconds"])


def theirs(base: Path, out: Path, rows: Any, step_rows: int, name: str, device: str) -> float:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokens = tokenized(base, rows)
    data = []
    for i in range(len(tokens.ids)):
        ids, start = tokens.row(i)
        labels = [-100] * start + ids[start:].tolist()
        data.append({"input_ids": ids.tolist(), "labels": labels})
    packing, flash = name == "trl packed", {}
    if packing:  # as many steps as the others: sequences of a step hold about its rows
        passes = max(1, round(step_rows * len(tokens.tokens) / len(data) / LONGEST))
        batch = 1
        if device == "cuda" and importlib.util.find_spec("flash_attn"):
            flash = {"attn_implementation": "flash_attention_2"}
    else:
        batch = 1 if name == "trl 1x16" else min(TRL_BATCH, step_rows)
        passes = step_rows // batch
    arguments = SFTConfig(
        output_dir=str(out),
        num_train_epochs=1,
        learning_rate=1e-4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=name == DEFAULT,
        packing=packing,
        max_length=LONGEST if packing else None,
        dataset_kwargs=None if packing else {"skip_prepare_dataset": True},
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, **flash),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    seen = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    assert seen == len(tokens.tokens), f"{name} trains on {seen} of {len(tokens.tokens)} tokens"
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def tokenized(base: Path, rows: Any) -> Any:
    from siftline.scoring.engines.base import ModelSpec
    from siftline.scoring.templates import load_tokenizer
    from siftline.training.schedule import tokenize_rows

    return tokenize_rows(rows, load_tokenizer(ModelSpec(path=str(base))), LONGEST)


def one(name: str, base: Path, count: int, step_rows: int, device: str) -> None:
    """Trains once and prints tokens a second and memory."""
    import pyarrow as pa
    import torch

    from siftline.rows import schema

    def run(rows: Any) -> float:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            if name in ("packed", "groups"):
                return ours(base, out, rows, step_rows, name == "packed")
            return theirs(base, out, rows, step_rows, name, device)

    torch.set_num_threads(os.cpu_count() or 1)
    rows = pa.Table.from_pylist(conversations(count), schema=schema.ROW)
    tokens = len(tokenized(base, rows).tokens)
    if device == "cuda":
        assert torch.cuda.is_available(), "no CUDA device"
        run(rows.slice(0, 2 * step_rows))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = run(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"rate": tokens / seconds, "mib": peak, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=sorted(MODELS), default="20M")
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="rate that shares are taken of")
    parser.add_argument("--only", help="contenders, by comma, instead of all")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.base, asked.rows, asked.batch_rows, asked.device)
        return
    if asked.batch_rows % TRL_BATCH and asked.batch_rows > TRL_BATCH:
        parser.error(f"--batch-rows {asked.batch_rows}: give a multiple of {TRL_BATCH}")
    names = tuple(asked.only.split(",")) if asked.only else CONTENDERS
    if not {DEFAULT} <= set(names) <= set(CONTENDERS):
        parser.error(f"--only takes {', '.join(CONTENDERS)}, with {DEFAULT} among them")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # One GPU: with several, SFTTrainer refuses to start without a launcher.
    quiet["CUDA_VISIBLE_DEVICES"] = "" if asked.device == "cpu" else "0"
    passed = [f"--rows={asked.rows}", f"--batch-rows={asked.batch_rows}", "--device", asked.device]
    with tempfile.TemporaryDirectory() as place:
        parameters = make_model(asked.model, Path(place))
        for turn in range(asked.rounds):
            for name in names if turn % 2 else names[::-1]:
                done = subprocess.run(
                    [sys.executable, __file__, "--one", name, "--base", place, *passed],
                    env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {turn + 1} {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    report(asked, parameters, found)


def report(
    asked: argparse.Namespace, parameters: int, found: dict[str, list[dict[str, float]]]
) -> None:
    """Prints what was run and a line for each contender."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    commit = described.stdout.strip() or "no commit known"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    print(f"bench_training.py {' '.join(sys.argv[1:])}, {date.today()}, {commit}")
    where = f"{os.cpu_count()} CPUs"
    if asked.device == "cuda":
        import torch

        where = f"{torch.cuda.get_device_name(0)}, flash_attn " + (
            version("flash_attn") if importlib.util.find_spec("flash_attn") else "not installed"
        )
    print(f"{parameters / 1e6:.1f} million parameters, {where}, {libraries}")
    tokens = next(iter(found.values()))[0]["tokens"]
    print(f"{tokens:,.0f} tokens in {asked.rows} rows, {asked.batch_rows} rows a step")
    if asked.peak_tflops:
        print(f"share of {asked.peak_tflops:g} TFLOP/s: 6 x parameters x tokens/s")
    print()
    base = statistics.median(run["rate"] for run in found[DEFAULT])
    for name, runs in found.items():
        rates = [run["rate"] for run in runs]
        rate, peak = statistics.median(rates), statistics.median(run["mib"] for run in runs)
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        times = f"{rate / base:5.2f} x {DEFAULT} (TRL's default)"
        line = f"{name:<10} {rate:9,.0f} tokens/s {spread:<20} {times}  {peak:8,.0f} MiB"
        if asked.peak_tflops:
            line += f"  {6 * parameters * rate / asked.peak_tflops / 1e12:6.1%}"
        print(line)


if __name__ == "__main__":
    main()
