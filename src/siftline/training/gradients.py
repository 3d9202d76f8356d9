"""Gradient features: which way one row would move an adapter, in few enough numbers to keep.

Xia et al. 2024 (LESS, arXiv 2402.04333). The feature of a row at a snapshot of the warm-up is the
gradient of its mean response loss by the adapter's weights, projected at random and scaled to unit
length. A row of the pool counts by its Adam update: the step that Adam, with the moments it had at
that point, would take next on that row alone. Rows of the target count by their plain gradient. The
features of all snapshots stand side by side, each times the root of its share of the learning
rates, so their inner product is the paper's sum over checkpoints of rate times cosine.

As in the paper: warm-up on a small share of the pool, one checkpoint for each pass weighted by its
mean learning rate, Adam for the pool and not for the target, signs as projection, unit length.
Otherwise: the Adam update is that of the paper and of torch, with bias correction and epsilon
outside the root (the released code leaves out the former and has the latter inside); the adapter is
on all linear layers and has no dropout; signs come from hashes and sums are in float32 (there:
float16). Rows run one at a time, as there, so neither padding nor neighbours touch a gradient.

Memory beside the model: `HELD_BYTES` of gradients (one row's at least, 4 bytes a weight of the
adapter), two moments of 4 bytes a weight, and a block of signs.

A random projection that is never held: signs are hashes of their place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from siftline.kernels.draws import hash64
from siftline.rows.schema import digest
from siftline.rows.verified import file_hash
from siftline.scoring.engines.base import Failed, ModelSpec, Span
from siftline.scoring.engines.devices import torch_device
from siftline.scoring.fingerprint import model_digest
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, response_span
from siftline.scoring.templates import load_tokenizer
from siftline.selectors.less import Gradients
from siftline.store.store import score_key
from siftline.training.objectives import read_tokens, token_scores
from siftline.training.packing import Row, check_head, padded
from siftline.training.schedule import IGNORED
from siftline.training.sft import load_model
from siftline.training.warmup import Snapshot, adapter_options, read_snapshot

# The splitmix64 increment and multipliers, written as the signed integers torch has.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""Bytes of the signs of one block in float32, by kind of device."""
WORD = 64


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 (products wrap; the masks make the shifts logical)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


def signs(
    start: int, stop: int, dimensions: int, seed: int, device: torch.device | None = None
) -> torch.Tensor:
    """Lines start to stop of the projection, times sqrt(d): float32 of +-1, (stop - start, d)."""
    words = -(-dimensions // WORD)
    base = hash64(seed, "gradient projection")
    number = torch.arange(start * words, stop * words, dtype=torch.int64, device=device)
    bits = _mix(number * GOLDEN + base).view(torch.uint8)  # little-endian bytes of every word
    # A table of the eight signs of every byte: four times as fast as shifting them out.
    byte = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    table = 1.0 - 2.0 * (byte & 1).to(torch.float32)
    out = table.index_select(0, bits.to(torch.int32)).view(stop - start, words * WORD)
    return out[:, :dimensions]


def project(vectors: torch.Tensor, dimensions: int, seed: int) -> torch.Tensor:
    """Projects rows to `dimensions` values.

    Args:
        vectors: float32, shape (n, P).
        dimensions: d.
        seed: Of the signs.

    Returns:
        float32, shape (n, d): `vectors` times signs over sqrt(d). What is held besides is a block
        of signs of `BLOCK_BYTES` and the bits it is made of.
    """
    kind = vectors.device.type
    width = -(-dimensions // WORD) * WORD
    lines = max(1, BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"]) // (4 * width))
    out = vectors.new_zeros((len(vectors), dimensions))
    for start in range(0, vectors.shape[1], lines):
        stop = min(start + lines, vectors.shape[1])
        out.addmm_(vectors[:, start:stop], signs(start, stop, dimensions, seed, vectors.device))
    return out.mul_(dimensions**-0.5)


VERSION = 1
"""Raise it when a change of this file changes features beyond rounding."""
RECORD = pa.schema([("key", pa.string()), ("vector", pa.binary())])
HELD_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}
"""Bytes of the gradients that are projected together, by kind of device: each such group makes the
signs anew."""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW as the warm-up runs it (torch's and transformers' defaults)."""

Kind = Literal["update", "gradient"]
"""What a row counts by: the Adam update of a pool's row, or the plain gradient."""
Question = tuple[list[int], Span]


def check_model(spec: ModelSpec) -> None:
    """Refuses models without gradients of an adapter of their own.

    Raises:
        ValueError: if it has an adapter already, or is no local model.
    """
    if spec.adapter is not None:
        raise ValueError(f"adapter {spec.adapter!r} under the features' own: merge it first")
    if spec.engine not in ("transformers", "vllm"):
        raise ValueError(f"engine {spec.engine!r} has no gradients: give a local model")


class GradientModel:
    """A model with an adapter, whose gradients are taken at any snapshot of its warm-up."""

    def __init__(self, spec: ModelSpec, asked: Gradients, seed: int) -> None:
        """Loads the model with a fresh adapter.

        Raises:
            ValueError: if it has an adapter already, is no local model, or changes its logits in a
                way that training does not know.
        """
        check_model(spec)
        self.spec, self.asked, self.seed = spec, asked, seed
        self.tokenizer = load_tokenizer(spec)
        self.max_length = spec.max_length
        config = adapter_options(asked, spec.max_length)
        self.model = load_model(Path(spec.path).expanduser(), config, seed)
        inner = self.model.get_base_model()
        read_tokens(inner)
        self.model.to(torch_device(spec.device)).eval()
        check_head(self.model)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self.parameters.values())
        self._start = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        self._at: tuple[Snapshot | None] | None = None
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self, snapshot: Snapshot | None) -> None:
        """Puts the adapter where a snapshot left it; None is the fresh one."""
        if self._at == (snapshot,):
            return
        weights = self._start if snapshot is None else read_snapshot(snapshot.path, "weight")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        self._moments = None
        if snapshot is not None:
            mean, square = (self._line(snapshot, kind) for kind in ("mean", "square"))
            self._moments = mean, square
        self._at = (snapshot,)

    def _line(self, snapshot: Snapshot, kind: str) -> torch.Tensor:
        """One moment of all weights, float32, shape (P,)."""
        stored = read_snapshot(snapshot.path, kind)
        return torch.cat([stored[n].flatten() for n in self.parameters]).to(self.model.device)

    def gradient(self, tokens: Sequence[int], span: Span) -> torch.Tensor:
        """Gradient of the mean loss over a row's span by all weights, float32, shape (P,)."""
        start, end = span
        assert 1 <= start < end == len(tokens), (span, len(tokens))
        row = torch.tensor(tokens, dtype=torch.int64)
        labels = row.clone()
        labels[:start] = IGNORED
        arguments = {k: v.to(self.model.device) for k, v in padded([Row(row, labels)], 0).items()}
        scores = self.model(**arguments, reader=token_scores)
        weights = list(self.parameters.values())
        found = torch.autograd.grad(-scores.logprobs.mean(), weights)
        return torch.cat([part.flatten().float() for part in found])

    def update(self, gradient: torch.Tensor, step: int) -> torch.Tensor:
        """The direction of Adam's next step on a gradient alone, at a snapshot of `step` steps."""
        assert self._moments is not None
        t, (first, second) = step + 1, BETAS
        mean = (first * self._moments[0] + (1 - first) * gradient) / (1 - first**t)
        square = (second * self._moments[1] + (1 - second) * gradient**2) / (1 - second**t)
        return mean / (square.sqrt() + EPSILON)

    def close(self) -> None:
        """Frees the model's memory."""
        self.model = None
        self.parameters, self._start, self._moments, self._at = {}, {}, None, None


class GradientEngine:
    """A `GradientModel` at one snapshot, as a recorder asks it."""

    def __init__(self, model: GradientModel, snapshot: Snapshot | None) -> None:
        self.model, self.snapshot = model, snapshot
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        asked = model.asked
        self._fingerprint = digest(
            VERSION,
            model_digest(model.spec),
            file_hash(snapshot.path) if snapshot else [model.seed, _version("peft")],
            [asked.rank, asked.dimensions, model.seed],
            [str(model.model.dtype), model.model.device.type, _version("torch")],
        )

    def fingerprint(self) -> str:
        """Hash of the model, the snapshot, the projection and the library that computes."""
        return self._fingerprint

    def features(self, questions: Sequence[Question], kind: Kind) -> list[np.ndarray | Failed]:
        """Features of rows, float32 of unit length, shape (d,) each; see the module's docstring.

        Args:
            questions: Token ids and the span of the response, of each row.
            kind: What the rows count by; "gradient" where there is no snapshot.
        """
        self.model.load(self.snapshot)
        device = self.model.model.device
        most = HELD_BYTES.get(device.type, HELD_BYTES["cuda"])
        group = max(1, most // (4 * self.model.size))
        out: list[np.ndarray | Failed] = []
        for start in range(0, len(questions), group):
            part = questions[start : start + group]
            held = torch.empty((len(part), self.model.size), device=device)
            for line, (tokens, span) in zip(held, part, strict=True):
                gradient = self.model.gradient(tokens, span)
                if kind == "update":
                    assert self.snapshot is not None
                    gradient = self.model.update(gradient, self.snapshot.step)
                line.copy_(gradient)
            out += _units(project(held, self.model.asked.dimensions, self.model.seed))
        return out


def _units(found: torch.Tensor) -> list[np.ndarray | Failed]:
    lengths = torch.linalg.vector_norm(found, dim=1)
    lines = (found / lengths[:, None]).cpu().numpy()
    return [
        line
        if 0 < length < float("inf")
        else Failed("no_gradient" if length == 0 else "not_finite")
        for line, length in zip(lines, lengths.tolist(), strict=True)
    ]


def _version(module: str) -> str:
    from importlib.metadata import version

    return f"{module} {'.'.join(version(module).split('.')[:2])}"


def gradient_features(
    recorders: Sequence[Recorder], bucket: int, rows: pa.Table, target: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Features of the rows of one store bucket at every snapshot, recorded.

    Args:
        recorders: One for each snapshot, with a `GradientEngine`; or one, of the fresh adapter.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.
        target: Whether they are rows of the target.

    Returns:
        float16 vectors of unit length by id, shape (snapshots * d,), and reasons by id of the rows
        that have none: `too_long`, `template_error`, `no_gradient`, `not_finite`.
    """
    questions: dict[str, tuple[int, Question]] = {}
    keys: dict[str, str] = {}
    failed: dict[str, str] = {}
    first = recorders[0]
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            tokens, span = response_span(
                first.engine.tokenizer,
                row["messages"],
                first.spec.template,
                tools=row["tools"],
                max_length=first.engine.max_length,
            )
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
            continue
        key = score_key(tokens, *span)
        questions[key] = (len(tokens), (tokens, span))
        keys[row["id"]] = key
    parts: dict[str, list[np.ndarray]] = {key: [] for key in questions}
    for recorder in recorders:
        found, reasons = _asked(recorder, bucket, questions, target)
        for key, vector in found.items():
            parts[key].append(vector)
        failed |= {i: reasons[key] for i, key in keys.items() if key in reasons}
    vectors = {
        i: np.concatenate(parts[key]).astype("<f2")
        for i, key in sorted(keys.items())
        if len(parts[key]) == len(recorders)
    }
    return vectors, failed


def _asked(
    recorder: Recorder, bucket: int, questions: dict[str, tuple[int, Question]], target: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Vectors at one snapshot, times the root of its weight, by key; and reasons by key."""
    engine: GradientEngine = recorder.engine
    preconditioned = not target and engine.snapshot is not None
    kind: Kind = "update" if preconditioned else "gradient"

    def answer(batch: Sequence[Question]) -> list[dict[str, Any] | str]:
        return [
            part.reason if isinstance(part, Failed) else {"vector": part.astype("<f2").tobytes()}
            for part in engine.features(batch, kind)
        ]

    records, reasons = recorder.ask(
        "gradients", VERSION, {"kind": kind}, RECORD, bucket, questions, answer
    )
    root = np.float32(1.0 if engine.snapshot is None else engine.snapshot.weight**0.5)
    pairs = zip(records["key"].to_list(), records["vector"].to_list(), strict=True)
    return {key: root * np.frombuffer(raw, "<f2").astype(np.float32) for key, raw in pairs}, reasons
