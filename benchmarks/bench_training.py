"""Fine-tuning: siftline's stage beside TRL's SFTTrainer on rows of mixed length, tokens a second.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_training.py [--rows 64] [--rounds 3]

A random Llama of 20 million parameters in float32, AdamW, 16 rows an optimizer step, one epoch:

    packed      siftline: rows end to end, no padding
    groups      siftline with packing off: passes of rows of like length
    trl         TRL with its default batch of 8, two passes a step, rows in random order, padded
    trl +ckpt   the same with gradient checkpointing, TRL's default
    trl 1x16    TRL with one row a pass: no padding, the most passes

Every contender is a process of its own that trains once on the same rows; one round runs each once.
Tokens count what the rows hold, prompt and response, without padding; seconds are those of the
training loop alone. Losses of the first step are of different rows and are not compared here; tests
hold that packed and padded rows give the same loss. Memory is the largest resident size. Medians.
"""

import argparse
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
from bench_scoring import make_model

CONTENDERS = ("packed", "groups", "trl", "trl +ckpt", "trl 1x16")
STEP_ROWS = 16
LONGEST = 1024


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of words that the tokenizer knows, of log-normal length, median about 150 tokens."""
    from siftline import schema

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


def ours(base: Path, out: Path, rows: Any, packing: bool) -> float:
    from siftline.training.finetune import FineTune, finetune

    config = FineTune(
        epochs=1, batch_rows=STEP_ROWS, max_length=LONGEST, learning_rate=1e-4, packing=packing
    )
    result = finetune(base, rows, out, config, seed=0, dataset_version="bench")
    assert result.skipped.is_empty(), result.skipped
    assert (result.facts["packed"] == "yes") == packing, result.facts["packed"]
    return float(result.facts["seconds"])


def theirs(base: Path, out: Path, rows: Any, batch: int, checkpointing: bool) -> float:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from siftline.scoring.engines import ModelSpec
    from siftline.scoring.templates import load_tokenizer
    from siftline.training.budget import tokenize_rows

    tokens = tokenize_rows(rows, load_tokenizer(ModelSpec(path=str(base))), LONGEST)
    data = []
    for i in range(len(tokens.ids)):
        ids, start = tokens.row(i)
        labels = [-100] * start + ids[start:].tolist()
        data.append({"input_ids": ids.tolist(), "labels": labels})
    arguments = SFTConfig(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=STEP_ROWS // batch,
        gradient_checkpointing=checkpointing,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def one(name: str, base: Path, count: int) -> None:
    """Trains once and prints tokens a second and memory."""
    import pyarrow as pa
    import torch

    from siftline import schema
    from siftline.scoring.engines import ModelSpec
    from siftline.scoring.templates import load_tokenizer
    from siftline.training.budget import tokenize_rows

    torch.set_num_threads(os.cpu_count() or 1)
    rows = pa.Table.from_pylist(conversations(count), schema=schema.ROW)
    tokens = len(tokenize_rows(rows, load_tokenizer(ModelSpec(path=str(base))), LONGEST).tokens)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        if name in ("packed", "groups"):
            seconds = ours(base, out, rows, name == "packed")
        else:
            seconds = theirs(base, out, rows, 1 if name == "trl 1x16" else 8, "ckpt" in name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rate": tokens / seconds, "mib": peak, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.base, asked.rows)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as place:
        parameters = make_model("20M", Path(place))
        for turn in range(asked.rounds):
            for name in CONTENDERS if turn % 2 else CONTENDERS[::-1]:
                command = [sys.executable, __file__, "--one", name, "--base", place]
                done = subprocess.run(
                    [*command, "--rows", str(asked.rows)],
                    env={**os.environ, **quiet}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {turn + 1} {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    print(
        f"bench_training.py --rows {asked.rows} --rounds {asked.rounds}, {date.today()}, {commit}"
    )
    print(f"{parameters / 1e6:.1f} million parameters, {os.cpu_count()} CPUs, {libraries}")
    print(f"{found['packed'][0]['tokens']:,.0f} tokens in {asked.rows} rows\n")
    base = statistics.median(run["rate"] for run in found["trl"])
    for name, runs in found.items():
        rates = [run["rate"] for run in runs]
        rate, peak = statistics.median(rates), statistics.median(run["mib"] for run in runs)
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        times = f"{rate / base:5.2f} x trl"
        print(f"{name:<10} {rate:8,.0f} tokens/s {spread:<18} {times}  {peak:6,.0f} MiB")


if __name__ == "__main__":
    main()
