"""Response log-probabilities: siftline's engines beside plain transformers loops and plain vLLM.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_scoring.py [--data FILE.jsonl]
        [--vllm 0.2] [--models 20M,90M] [--rounds 5] [--threads 2] [--json FILE]
        [--device cpu] [--dtype float32]

Random Llama models are made on the spot (`MODELS`). Rows are token ids of question and
answer: of a JSONL file with these two columns if one is given, cut into digits, signs and pieces of
at most eight letters that are hashed to ids; else of lengths like GSM8K's. All get the same rows:

    loop       model(row).logits -> log_softmax -> gather, row by row
    padded     the same for 8 rows at a time, in the order given, with all logits
    siftline   the transformers engine over planned batches, as a run calls it
    +details   the same with entropy, top-1 hits and the pooled hidden state
    vllm       vLLM with prompt_logprobs=1 (with --vllm SHARE, on that share of the rows; 1 is all)
    +vllm      siftline's vllm engine, on the same share

Each contender is a process of its own and stays open; one round runs each once, in turn. First all
score the rows once unrecorded, and must agree within 1e-4 in float32 (`TOLERANCE`). Seconds are
medians of the rounds; the machine is shared, so quote the ratios. Two ratios are given: of wall
time, and of processor time, which neighbours disturb less. Memory is the largest resident size, and
how much of it came on top of the loaded model. At last come 4,096 and 32,768 tokens a batch, for
memory alone.

On a card (--device cuda) memory is what torch allocated there, which says nothing of vLLM's worker
(nan). `matrix` is the share of the card's own matrix rate that a contender reaches: tokens a second
times two operations a parameter, over those of a square matrix product timed beside it in the same
type. Attention is not counted, nor that siftline leaves out the vocabulary of unscored tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scoring_contenders import (
    MODELS,
    PADDED_ROWS,
    VLLM,
    Memory,
    Row,
    make_model,
    make_rows,
    matrix_rate,
    open_contender,
    processor_seconds,
)

TORCH = ("loop", "padded", "siftline", "siftline+details")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of log-probabilities; in half precision that of the engine's check at load."""
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def serve(name: str, asked: argparse.Namespace) -> None:
    """Answers each line, a file of rows, with a line of facts. Scores go beside the rows."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(asked.threads)
    score = open_contender(name, asked.folder, asked.batch_tokens, asked.device, asked.dtype)
    memory = Memory(name, asked.device)
    loaded = memory.mib(peak=False)
    for line in sys.stdin:
        rows = [(row, tuple(span)) for row, span in json.loads(Path(line.strip()).read_text())]
        memory.restart()
        begun, used = time.perf_counter(), processor_seconds()
        found = score(rows)
        facts = {
            "seconds": time.perf_counter() - begun,
            "processor_seconds": processor_seconds() - used,
            "peak_mib": memory.mib(peak=True),
            "loaded_mib": loaded,
        }
        np.save(f"{line.strip()}.{name}.npy", np.concatenate(found))
        answers.write(json.dumps(facts) + "\n")


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, folder: Path, asked, batch_tokens: int = 16_384) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
        command += ["--batch-tokens", str(batch_tokens), "--threads", str(asked.threads)]
        command += ["--device", asked.device, "--dtype", asked.dtype]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if name in VLLM else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(asked.threads)} | QUIET,
        )

    def ask(self, rows: Path) -> dict[str, float]:
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(names: tuple[str, ...], folder: Path, rows: list[Row], asked) -> dict:
    """Times contenders on the same rows, in turn, after they agreed on them."""
    path = folder / f"rows-{len(rows)}.json"
    path.write_text(json.dumps(rows))
    contenders = [Contender(name, folder, asked) for name in names]
    for contender in contenders:
        contender.ask(path)
    scores = [np.load(f"{path}.{name}.npy") for name in names]
    worst = float(np.abs(np.stack(scores) - scores[0]).max())
    assert worst < TOLERANCE[asked.dtype], f"contenders differ by {worst}"
    for _ in range(asked.rounds):
        for contender in contenders:
            contender.rounds.append(contender.ask(path))
    for contender in contenders:
        contender.close()
    tokens = sum(len(row) for row, _ in rows)
    table = {c.name: summary(c.rounds, tokens) for c in contenders}
    for line in table.values():
        for kind in ("seconds", "processor_seconds"):
            line[f"{kind}_ratio"] = table[names[0]][kind] / line[kind]
    return {"rows": len(rows), "tokens": tokens, "difference": worst, "contenders": table}


def summary(rounds: list[dict[str, float]], tokens: int) -> dict[str, float]:
    median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    return {
        **median,
        "tokens_per_second": tokens / median["seconds"],
        "added_mib": max(r["peak_mib"] for r in rounds) - median["loaded_mib"],
    }


def memory(folder: Path, vocabulary: int, asked) -> list[dict]:
    """Peak memory with one batch of a given size, each in a fresh process."""
    rng = np.random.default_rng(1)
    out = []
    for name, tokens in (("padded", 4096), ("siftline", 4096), ("siftline", 32_768)):
        size = tokens // PADDED_ROWS if name == "padded" else 256
        rows = [(rng.integers(3, vocabulary, size).tolist(), (1, size))] * (tokens // size)
        path = folder / f"memory-{tokens}-{name}.json"
        path.write_text(json.dumps(rows))
        contender = Contender(name, folder, asked, tokens)
        facts = contender.ask(path)
        contender.close()
        logits = tokens * vocabulary * 4 / 2**20
        added = facts["peak_mib"] - facts["loaded_mib"]
        out.append({"name": name, "tokens": tokens, "logits_mib": logits, "added_mib": added})
    return out


def report(model: dict) -> None:
    for part in model["parts"]:
        print(
            f"\n{model['name']}: {model['parameters']:,} parameters, vocabulary "
            f"{model['vocabulary']:,}; {part['rows']} rows, {part['tokens']:,} tokens, "
            f"{model['answer_share']:.0%} of them scored; agree within {part['difference']:.1e}"
        )
        heads = (
            f"{'tokens/s':>10}{'ratio':>8}{'by CPU':>8}{'peak MiB':>10}{'added':>8}{'matrix':>8}"
        )
        print(f"{'':<18}{heads}")
        for name, line in part["contenders"].items():
            print(
                f"{name:<18}{line['tokens_per_second']:>10,.0f}{line['seconds_ratio']:>8.2f}"
                f"{line['processor_seconds_ratio']:>8.2f}{line['peak_mib']:>10,.0f}"
                f"{line['added_mib']:>8,.0f}{line['matrix_share']:>8.1%}"
            )
    for line in model["memory"]:
        print(
            f"{line['name']:<18}one batch of {line['tokens']:>6,} tokens: "
            f"{line['added_mib']:>7,.0f} MiB on top of the model "
            f"(all logits: {line['logits_mib']:,.0f} MiB)"
        )


def matrix_rate_apart(asked) -> float:
    """`matrix_rate` in a process of its own, which has the card's memory to itself for a moment."""
    command = [sys.executable, __file__, "--matrix", "--threads", str(asked.threads)]
    command += ["--device", asked.device, "--dtype", asked.dtype]
    environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads)} | QUIET
    return float(subprocess.run(command, env=environment, check=True, stdout=-1, text=True).stdout)


def measure(name: str, asked) -> dict:
    vocabulary, count = MODELS[name][5:]
    rows = make_rows(asked.data, asked.rows or count, vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_model(name, folder)
        parts = [compare(TORCH, folder, rows, asked)]
        if asked.vllm:
            few = rows[: max(2, round(asked.vllm * len(rows)))]
            parts.append(compare(("loop", "siftline", *VLLM), folder, few, asked))
        rate = matrix_rate_apart(asked)
        for part in parts:
            for line in part["contenders"].values():
                line["matrix_share"] = line["tokens_per_second"] * 2 * parameters / rate
        model = {
            "name": name,
            "matrix_operations_per_second": rate,
            "parameters": parameters,
            "vocabulary": vocabulary,
            "answer_share": sum(b - a for _, (a, b) in rows) / sum(len(r) for r, _ in rows),
            "parts": parts,
            "memory": memory(folder, vocabulary, asked) if name == asked.memory else [],
        }
    report(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="JSONL with question and answer; else rows are made up")
    parser.add_argument("--models", default="20M,90M")
    parser.add_argument("--rows", type=int, help="by default as many as MODELS says")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", type=float, default=0, help="share of the rows vllm scores too")
    parser.add_argument("--memory", default="20M", help="model of the memory part; none skips it")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0; vllm's is its platform's")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--matrix", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--batch-tokens", type=int, default=16_384, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked)
        return
    if asked.matrix:
        import torch

        torch.set_num_threads(asked.threads)
        print(matrix_rate(asked.device, asked.dtype))
        return
    result = {
        "threads": asked.threads,
        "device": asked.device,
        "dtype": asked.dtype,
        "rounds": asked.rounds,
        "rows_from": Path(asked.data).name if asked.data else "generated",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "load_before": os.getloadavg()[0],
        "models": [measure(name, asked) for name in asked.models.split(",")],
    }
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
