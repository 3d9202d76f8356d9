"""Pretrains a small Llama from text, so that the whole chain can be shown with no model at hand.

The result is an ordinary model directory (safetensors, config, tokenizer with chat template) that
every engine loads. The loop is plain torch: at 1.8 million parameters a Trainer's bookkeeping would
cost more than the model. The same texts, configuration and kind of processor give the same bytes of
weights.

Documents are packed into windows that start at a document's start: one that overflows is cut and
opens the next window again, whole. So nothing is padding, and most documents are seen from their
first token, as they will be asked. Attention crosses the documents of a window.

Tokenizers made from text on the spot: one token a character, or byte-level BPE.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import hash64, uniforms
from siftline.scoring.fingerprint import record_files

SPECIALS = ("<pad>", "<eos>", "<bos>")
UNKNOWN = "<unk>"
BYTES = 256
CORE = " \n.,:;?!'\"()+-*/=%$#0123456789"
"""Characters always known, so that a model whose corpus lacks one can still be asked with it."""


def _wrap(backend: Any, context: int, unknown: str | None = None) -> Any:
    """A transformers tokenizer around `backend`, with the template and no post-processing."""
    from transformers import PreTrainedTokenizerFast

    from siftline.scoring.templates import QUESTION_ANSWER

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token=unknown,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = QUESTION_ANSWER
    return tokenizer


def char_tokenizer(texts: Sequence[str], vocab: int, context: int) -> Any:
    """One token a character; the rarest characters beyond `vocab` become <unk>.

    Args:
        texts: The corpus.
        vocab: Most tokens, specials included.
        context: Most tokens of a row, recorded as `model_max_length`.

    Returns:
        A PreTrainedTokenizerFast; the same for the same multiset of characters.

    Raises:
        ValueError: if `vocab` can't hold the specials and `CORE`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    specials = (*SPECIALS, UNKNOWN)
    room = vocab - len(specials)
    if room < len(CORE):
        raise ValueError(
            f"vocab is {vocab}: one token a character needs {len(specials) + len(CORE)}"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    frequent = sorted(set(counts) - set(CORE), key=lambda c: (-counts[c], c))[: room - len(CORE)]
    pieces = [*specials, *sorted({*CORE, *frequent})]
    # BPE without merges is the model that splits into characters by itself, no regular expression.
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token=UNKNOWN)
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return _wrap(backend, context, UNKNOWN)


def bpe_tokenizer(texts: Sequence[str], vocab: int, context: int) -> Any:
    """Byte-level BPE learned from `texts`, with single digits.

    Args:
        texts: The corpus.
        vocab: Most tokens, specials and the 256 bytes included.
        context: Most tokens of a row, recorded as `model_max_length`.

    Raises:
        ValueError: if `vocab` can't hold the specials and the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < BYTES + len(SPECIALS):
        raise ValueError(f"vocab is {vocab}: byte-level BPE needs {BYTES + len(SPECIALS)} or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Ties between pairs are settled by the order of first sight: sorted, input order has no say.
    backend.train_from_iterator(sorted(texts), trainer=trainer)
    return _wrap(backend, context)


ENCODE_BATCH = 4096
SHARDS = 2
"""Parts of a batch on a CPU. Part of what the weights depend on, so not the number of cores."""
WEIGHT_DECAY = 0.1
"""Of matrices alone, as in GPT-3 (Brown et al. 2020)."""


@dataclass(frozen=True)
class Pretrain:
    """A model to make, and how.

    Attributes:
        tokenizer: `chars` (one token a character) or `bpe` (byte-level, single digits).
        vocab: Most tokens; a corpus with fewer characters makes fewer.
        hidden: Width; the feed-forward layer is 8/3 of it (Shazeer 2020), in steps of 64.
        layers: Decoder layers.
        heads: Attention heads.
        context: Tokens of a training window, and so the longest row the model takes. 512
            characters hold a word problem of a few steps.
        steps: Optimizer steps.
        batch_tokens: Tokens of one step.
        lr: Peak learning rate; 2e-3 is steady for AdamW at a few million parameters.
        warmup: Share of the steps with rising rate; then cosine down to a tenth.
        seed: Of the initial weights and the order of documents.
    """

    tokenizer: Literal["chars", "bpe"] = "chars"
    vocab: int = 512
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    context: int = 512
    steps: int = 400
    batch_tokens: int = 4096
    lr: float = 2e-3
    warmup: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer not in ("chars", "bpe"):
            raise ValueError(f"tokenizer is {self.tokenizer!r}: choose chars or bpe")
        for name in ("hidden", "layers", "heads", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden % (2 * self.heads):  # rotary embeddings turn pairs
            raise ValueError(f"hidden {self.hidden} must be a multiple of 2 x heads {self.heads}")
        if not 2 <= self.context <= self.batch_tokens:
            raise ValueError(
                f"context is {self.context}: choose 2 to batch_tokens ({self.batch_tokens}) tokens"
            )
        if not self.lr > 0 or not 0 <= self.warmup < 1:
            raise ValueError(f"lr {self.lr} must be above 0, warmup {self.warmup} in [0, 1)")


@dataclass(frozen=True)
class PretrainResult:
    """What came out.

    Attributes:
        model_dir: The model directory.
        curve: step (from 1), loss (mean over the step's tokens, in nats), learning_rate.
        parameters: Number of weights, tied ones once.
        tokens: Tokens trained on.
        epochs: How often the corpus was gone through.
    """

    model_dir: Path
    curve: pl.DataFrame
    parameters: int
    tokens: int
    epochs: float


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """Yields the `text` of every line of JSONL files.

    Raises:
        ValueError: if a line is not a JSON object with a string `text`.
    """
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f'{file} line {number}: expected {{"text": ...}}, found {line[:60]!r}'
                    ) from error
                if not isinstance(text, str):
                    raise ValueError(f"{file} line {number}: text is {text!r}, expected a string")
                yield text


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text as the chat template would start and end it: <bos>, text, <eos>."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = []
    for first in range(0, len(texts), ENCODE_BATCH):
        chunk = tokenizer(list(texts[first : first + ENCODE_BATCH]), add_special_tokens=False)
        documents += [np.array([start, *ids, end], dtype=np.int64) for ids in chunk["input_ids"]]
    return documents


def windows(
    documents: Sequence[np.ndarray], keys: Sequence[str], seed: int, length: int
) -> Iterator[np.ndarray]:
    """Yields windows without end, each epoch in an order of its own.

    Args:
        documents: Token ids of each document.
        keys: One key per document; the order depends on the keys, not on positions.
        seed: Seed of the order.
        length: Tokens of a window.

    Yields:
        int64 arrays of shape (length,).
    """
    assert documents
    epoch, window = 0, np.empty(0, dtype=np.int64)
    while True:
        u = uniforms(seed, "pretrain order", keys, epoch)
        for position in np.lexsort((np.asarray(keys), u)):
            rest = documents[position]
            while len(window) + len(rest) >= length:
                taken = length - len(window)
                yield np.concatenate([window, rest[:taken]])
                # A cut document starts again, unless even a window of its own can't hold it.
                rest = rest[taken:] if len(window) == 0 or taken == len(rest) else rest
                window = window[:0]
            window = np.concatenate([window, rest])
        epoch += 1


def learning_rate(config: Pretrain, step: int) -> float:
    """Rate of `step` (from 0): linear warm-up, then cosine to a tenth of the peak."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    done = (step - rise) / max(1, config.steps - rise)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _build(config: Pretrain, tokenizer: Any) -> Any:
    """The untrained model, in float32, with seeded weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=64 * math.ceil(config.hidden * 8 / 3 / 64),
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(hash64(config.seed, "pretrain weights"))
        return LlamaForCausalLM._from_config(llama, attn_implementation="sdpa")


def _optimizer(model: Any, config: Pretrain) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone: sums have one order, small matrices no waits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shard(model: Any, windows: np.ndarray) -> tuple[float, list[Any]]:
    """Summed loss of some windows, int (n, context + 1), and its gradient by parameter."""
    import torch
    from torch.nn.functional import cross_entropy

    parameters = list(model.parameters())
    device = parameters[0].device
    batch = torch.from_numpy(windows).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    targets = batch[:, 1:].flatten()
    loss = cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return loss.item(), list(torch.autograd.grad(loss, parameters))


def _train(
    model: Any, stream: Iterator[np.ndarray], config: Pretrain, progress: Callable[[int, int], None]
) -> list[dict[str, float]]:
    """Runs the steps; gives one line of the curve a step.

    On a CPU a batch is computed in `SHARDS` parts side by side, one thread each, and their
    gradients are added in order: the weights do not depend on how many cores there are.
    """
    import torch

    optimizer = _optimizer(model, config)
    rows = config.batch_tokens // config.context
    cuda = next(model.parameters()).device.type == "cuda"
    parts = 1 if cuda else min(SHARDS, rows)
    lines: list[dict[str, float]] = []
    model.train()
    pool = ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,))
    with _one_thread(), pool:
        for step in range(config.steps):
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = np.stack([next(stream) for _ in range(rows)])
            found = list(pool.map(partial(_shard, model), np.array_split(batch, parts)))
            tokens = rows * config.context
            for parameter, *gradients in zip(
                model.parameters(), *(gradients for _, gradients in found), strict=True
            ):
                parameter.grad = sum(gradients[1:], gradients[0]) / tokens
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss = sum(part for part, _ in found) / tokens
            lines.append({"step": step + 1, "loss": loss, "learning_rate": rate})
            progress(step + 1, config.steps)
    return lines


def pretrain(
    texts: Iterable[str],
    config: Pretrain,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PretrainResult:
    r"""Makes a tokenizer and a model from `texts` and writes both to `out`.

    Texts should look as rows will once templated ("Question: ...\nAnswer: ..."). Uses CUDA with
    bfloat16 autocast if there is a device, else the CPU in float32.

    Args:
        texts: Documents; they are held in memory. Their order changes nothing.
        config: What to make.
        out: The model directory, made anew.
        progress: Called with (steps done, steps in all) after every step.

    Raises:
        ValueError: if there is no text, or `out` already holds a model.
    """
    import torch

    if (out / "config.json").exists():
        raise ValueError(f"{str(out)!r} already holds a model: name a new folder or remove it")
    documents = [text for text in texts if text]
    if not documents:
        raise ValueError("no text to pretrain on: give at least one document that is not empty")
    make = char_tokenizer if config.tokenizer == "chars" else bpe_tokenizer
    tokenizer = make(documents, config.vocab, config.context)
    keys = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in documents]
    encoded = encode_documents(tokenizer, documents)
    model = _build(config, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    # One token more than a window: the last one is only a target.
    stream = windows(encoded, keys, config.seed, config.context + 1)
    lines = _train(model, stream, config, progress)
    model.to("cpu").eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record_files(out)
    tokens = config.steps * (config.batch_tokens // config.context) * config.context
    return PretrainResult(
        model_dir=out,
        curve=pl.DataFrame(lines, schema_overrides={"step": pl.Int64}),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        epochs=tokens / sum(len(ids) for ids in encoded),
    )
