"""What bench_scoring.py compares: models, rows and contenders, and what they are measured by.

A contender is a function from rows to the log-probabilities of their answers.
"""

import json
import math
import os
import re
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

MODELS = {
    # hidden, MLP, layers, heads, key-value heads, vocabulary; embeddings tied; and rows scored
    "20M": (320, 864, 9, 10, 5, 32_000, 64),
    "90M": (576, 1536, 17, 9, 3, 49_152, 32),  # SmolLM-135M with 17 of its 30 layers
}
VLLM = ("vllm", "siftline+vllm")
PADDED_ROWS = 8
PLANNED_ROWS = 256
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product is timed."""
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


def open_loop(folder: str, rows_at_once: int, device: str, dtype: str) -> Score:
    """What one writes first: all logits of a row, or of several with padding."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.to(device)

    @torch.inference_mode()
    def score(rows: list[Row]) -> list[np.ndarray]:
        out = []
        for first in range(0, len(rows), rows_at_once):
            part = rows[first : first + rows_at_once]
            longest = max(len(row) for row, _ in part)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in part]).to(device)
            mask = (torch.arange(longest) < torch.tensor([[len(row)] for row, _ in part])).long()
            logits = model(input_ids=ids, attention_mask=mask.to(device)).logits
            logprobs = logits.float().log_softmax(dim=-1)
            for line, (row, (start, end)) in zip(logprobs, part, strict=True):
                targets = torch.tensor(row[start:end], device=device)[:, None]
                picked = line[start - 1 : end - 1].gather(1, targets)[:, 0]
                out.append(picked.cpu().numpy())
        return out

    return score


def open_siftline(
    folder: str, engine_name: str, details: bool, batch_tokens: int, device: str, dtype: str
) -> Score:
    from siftline.scoring.engines.base import DETAILS, ModelSpec, open_engine
    from siftline.scoring.engines.batching import plan_batches

    engine = open_engine(ModelSpec(folder, engine_name, dtype=dtype, device=device))

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


def open_vllm(folder: str, dtype: str) -> Score:
    """vLLM's defaults, but for what this machine needs (eager mode, a small cache)."""
    from siftline.scoring.engines.vllm_options import installed, set_environment

    _, cpu = installed()
    set_environment("auto", cpu=cpu)
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype=dtype, max_model_len=2048, enforce_eager=True)
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


def open_contender(name: str, folder: str, batch_tokens: int, device: str, dtype: str) -> Score:
    if name == "loop":
        return open_loop(folder, 1, device, dtype)
    if name == "padded":
        return open_loop(folder, PADDED_ROWS, device, dtype)
    if name == "vllm":
        return open_vllm(folder, dtype)
    engine = "vllm" if name == "siftline+vllm" else "transformers"
    details = name == "siftline+details"
    return open_siftline(folder, engine, details, batch_tokens, device, dtype)


def matrix_rate(device: str, dtype: str) -> float:
    """Operations a second of a square matrix product: the median of 20."""
    import torch

    side = MATRIX[device.partition(":")[0]]
    left, right = (
        torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in "ab"
    )
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / statistics.median(seconds)


class Memory:
    """Peak and present memory in MiB: resident on a CPU, what torch allocated on a card."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        self.known = device == "cpu" or name not in VLLM

    def restart(self) -> None:
        """The peak starts anew."""
        if self.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return
        for folder in family():
            (folder / "clear_refs").write_text("5")

    def mib(self, peak: bool) -> float:
        if not self.known:
            return math.nan
        if self.device == "cpu":
            return resident("VmHWM" if peak else "VmRSS")
        import torch

        measure = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return measure(self.device) / 2**20


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
