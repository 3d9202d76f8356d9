"""Response log-probabilities: siftline's engines beside plain transformers loops and plain vLLM.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_scoring.py [--data FILE.jsonl]
        [--vllm 0.2] [--models 20M,90M] [--rounds 5] [--threads 2] [--json FILE]

Random Llama models are made on the spot, in float32 (`MODELS`). Rows are token ids of question and
answer: of a JSONL file with these two columns if one is given, cut into digits, signs and pieces of
at most eight letters that are hashed to ids; else of lengths like GSM8K's. All get the same rows:

    loop       model(row).logits -> log_softmax -> gather, row by row
    padded     the same for 8 rows at a time, in the order given, with all logits
    siftline   the transformers engine over planned batches, as a run calls it
    +details   the same with entropy, top-1 hits and the pooled hidden state
    vllm       vLLM with prompt_logprobs=1 (with --vllm SHARE, on that share of the rows)
    +vllm      siftline's vllm engine, on the same share

Each contender is a process of its own and stays open; one round runs each once, in turn. First all
score the rows once unrecorded, and must agree within 1e-4. Seconds are medians of the rounds; the
machine is shared, so quote the ratios. Two ratios are given: of wall time, and of processor time,
which neighbours disturb less. Memory is the largest resident size, and how much of it came on top
of the loaded model. At last come 4,096 and 32,768 tokens a batch, for memory alone.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

MODELS = {
    # hidden, MLP, layers, heads, key-value heads, vocabulary; embeddings tied; and rows scored
    "20M": (320, 864, 9, 10, 5, 32_000, 64),
    "90M": (576, 1536, 17, 9, 3, 49_152, 32),  # SmolLM-135M with 17 of its 30 layers
}
TORCH = ("loop", "padded", "siftline", "siftline+details")
VLLM = ("vllm", "siftline+vllm")
PADDED_ROWS = 8
PLANNED_ROWS = 256
TOLERANCE = 1e-4
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
Row = tuple[list[int], tuple[int, int]]
Score = Callable[[list[Row]], list[np.ndarray]]


def make_model(name: str, folder: Path) -> int:
    """Writes a random Llama and a tokenizer of as many words; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, mlp, layers, heads, pairs, vocabulary, _ = MODELS[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.06,  # the usual 0.02 gives nearly uniform predictions
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_rows(data: str | None, count: int, vocabulary: int) -> list[Row]:
    """(tokens, (start, end) of the answer) of `count` rows spread over the file, or made up."""
    rng = np.random.default_rng(0)
    if data is None:
        question = rng.lognormal(np.log(60), 0.4, count).astype(int) + 5
        answer = rng.lognormal(np.log(110), 0.5, count).astype(int) + 5
        sizes = list(zip(question.tolist(), answer.tolist(), strict=True))
        drawn = [rng.integers(3, vocabulary, q + a).tolist() for q, a in sizes]
        return [(row, (q, q + a)) for row, (q, a) in zip(drawn, sizes, strict=True)]
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    rows = []
    for place in np.linspace(0, len(lines) - 1, count).astype(int):
        line = json.loads(lines[place])
        question = ids_of(f"Question: {line['question']} Answer:", vocabulary)
        answer = [*ids_of(line["answer"], vocabulary), 1]
        rows.append(([*question, *answer], (len(question), len(question) + len(answer))))
    return rows


def ids_of(text: str, vocabulary: int) -> list[int]:
    pieces = re.findall(r"[^\W\d]{1,8}|\d|[^\w\s]", text)
    return [3 + zlib.crc32(piece.encode()) % (vocabulary - 3) for piece in pieces]


def open_loop(folder: str, rows_at_once: int) -> Score:
    """What one writes first: all logits of a row, or of several with padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(rows: list[Row]) -> list[np.ndarray]:
        out = []
        for first in range(0, len(rows), rows_at_once):
            part = rows[first : first + rows_at_once]
            longest = max(len(row) for row, _ in part)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in part])
            mask = (torch.arange(longest) < torch.tensor([[len(row)] for row, _ in part])).long()
            logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(dim=-1)
            for line, (row, (start, end)) in zip(logprobs, part, strict=True):
                targets = torch.tensor(row[start:end])[:, None]
                out.append(line[start - 1 : end - 1].gather(1, targets)[:, 0].numpy())
        return out

    return score


def open_siftline(folder: str, engine_name: str, details: bool, batch_tokens: int) -> Score:
    from siftline.scoring.batching import plan_batches
    from siftline.scoring.engines import DETAILS, ModelSpec, open_engine

    engine = open_engine(ModelSpec(folder, engine_name, device="cpu"))

    def score(rows: list[Row]) -> list[np.ndarray]:
        lengths, names = [len(row) for row, _ in rows], [f"{i:06}" for i in range(len(rows))]
        out = {}
        for batch in plan_batches(lengths, names, batch_tokens, PLANNED_ROWS):
            tokens, spans = [rows[i][0] for i in batch], [rows[i][1] for i in batch]
            if details:
                found = [part.logprobs for part in engine.inspect(tokens, spans, DETAILS)]
            else:
                found = engine.score(tokens, spans)
            out |= zip(batch, found, strict=True)
        return [out[i] for i in range(len(rows))]

    return score


def open_vllm(folder: str) -> Score:
    """vLLM's defaults, but for what this machine needs (eager mode, a small cache)."""
    from siftline.scoring.vllm_options import installed, set_environment

    _, cpu = installed()
    set_environment("auto", cpu=cpu)
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=2048, enforce_eager=True)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)

    def score(rows: list[Row]) -> list[np.ndarray]:
        prompts = [{"prompt_token_ids": row} for row, _ in rows]
        return [
            np.array([found.prompt_logprobs[i][row[i]].logprob for i in range(start, end)])
            for found, (row, (start, end)) in zip(
                llm.generate(prompts, asked, use_tqdm=False), rows, strict=True
            )
        ]

    return score


def open_contender(name: str, folder: str, batch_tokens: int) -> Score:
    if name == "loop":
        return open_loop(folder, 1)
    if name == "padded":
        return open_loop(folder, PADDED_ROWS)
    if name == "vllm":
        return open_vllm(folder)
    engine = "vllm" if name == "siftline+vllm" else "transformers"
    return open_siftline(folder, engine, name == "siftline+details", batch_tokens)


def family() -> list[Path]:
    """Folders in /proc of this process and its children: the vllm engine has a worker."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    return [Path(f"/proc/{pid}") for pid in (own, *children)]


def resident(field: str) -> float:
    """MiB of a line of /proc/PID/status, summed."""
    lines = [(folder / "status").read_text() for folder in family()]
    return sum(int(re.search(rf"{field}:\s+(\d+)", text)[1]) for text in lines) / 1024


def processor_seconds() -> float:
    stats = [(folder / "stat").read_text().rsplit(")", 1)[1].split() for folder in family()]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def serve(name: str, folder: str, batch_tokens: int, threads: int) -> None:
    """Answers each line, a file of rows, with a line of facts. Scores go beside the rows."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(threads)
    score = open_contender(name, folder, batch_tokens)
    loaded = resident("VmRSS")
    for line in sys.stdin:
        rows = [(row, tuple(span)) for row, span in json.loads(Path(line.strip()).read_text())]
        for folder_of in family():
            (folder_of / "clear_refs").write_text("5")  # the peak starts anew
        begun, used = time.perf_counter(), processor_seconds()
        found = score(rows)
        facts = {
            "seconds": time.perf_counter() - begun,
            "processor_seconds": processor_seconds() - used,
            "peak_mib": resident("VmHWM"),
            "loaded_mib": loaded,
        }
        np.save(f"{line.strip()}.{name}.npy", np.concatenate(found))
        answers.write(json.dumps(facts) + "\n")


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, folder: Path, threads: int, batch_tokens: int = 16_384) -> None:
        self.name = name
        self.rounds: list[dict[str, float]] = []
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--batch-tokens", str(batch_tokens), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if name in VLLM else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | QUIET,
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
    contenders = [Contender(name, folder, asked.threads) for name in names]
    for contender in contenders:
        contender.ask(path)
    scores = [np.load(f"{path}.{name}.npy") for name in names]
    worst = float(np.abs(np.stack(scores) - scores[0]).max())
    assert worst < TOLERANCE, f"contenders differ by {worst}"
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
        contender = Contender(name, folder, asked.threads, tokens)
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
        print(f"{'':<18}{'tokens/s':>10}{'ratio':>8}{'by CPU':>8}{'peak MiB':>10}{'added':>8}")
        for name, line in part["contenders"].items():
            print(
                f"{name:<18}{line['tokens_per_second']:>10,.0f}{line['seconds_ratio']:>8.2f}"
                f"{line['processor_seconds_ratio']:>8.2f}{line['peak_mib']:>10,.0f}"
                f"{line['added_mib']:>8,.0f}"
            )
    for line in model["memory"]:
        print(
            f"{line['name']:<18}one batch of {line['tokens']:>6,} tokens: "
            f"{line['added_mib']:>7,.0f} MiB on top of the model "
            f"(all logits: {line['logits_mib']:,.0f} MiB)"
        )


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
        model = {
            "name": name,
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
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--batch-tokens", type=int, default=16_384, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.folder, asked.batch_tokens, asked.threads)
        return
    result = {
        "threads": asked.threads,
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
