"""Texts to unit vectors: a named sentence-transformers model, or a causal model's hidden states.

Both sit behind one method, so diversity and near-duplicate stages do not ask which it is.

Embeddings of prompts, by a named embedding model or by a causal model's own hidden states.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from siftline import scoring as versions
from siftline.rows.schema import digest
from siftline.scoring.engines.base import Engine, ModelSpec, check_directory, open_engine
from siftline.scoring.engines.batching import plan_batches
from siftline.scoring.fingerprint import model_fingerprint
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, encode, response_span, start_token
from siftline.store.store import score_key

MAX_ROWS = 512


class TextEmbedder(Protocol):
    """Turns texts into vectors.

    Attributes:
        max_length: Tokens of a text that are read; what lies behind is not seen (`token_counts`
            tells which texts that concerns).
    """

    max_length: int

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length vectors, float32 (n, d), in the order of the texts."""
        ...

    def embed_conversations(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Vectors of rows with id, messages and tools, roles and all, and reasons, by id."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is cut to `max_length`."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that decides the vectors; no path and no name in it."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model from a local directory, with its own pooling."""

    def __init__(self, spec: ModelSpec) -> None:
        """Loads the model.

        Raises:
            ValueError: if the directory is missing, or an adapter is named.
        """
        if spec.adapter is not None:
            raise ValueError(f"adapter {spec.adapter!r} on a sentence-transformers model: merge it")
        import torch
        from sentence_transformers import SentenceTransformer

        self.spec = spec
        self._model: Any = SentenceTransformer(
            str(check_directory(spec)),
            device=None if spec.device == "auto" else spec.device,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs={"dtype": getattr(torch, spec.dtype)},
        ).eval()
        self.max_length = min(spec.max_length, self._model.max_seq_length or spec.max_length)
        self._model.max_seq_length = self.max_length
        self._versions = _versions("torch", "sentence_transformers")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length vectors, float32 (n, d), in the order of the texts.

        Texts run in planned batches, so a vector does not depend on the order they came in.

        Raises:
            ValueError: if there are no texts.
        """
        lengths = [min(n, self.max_length) for n in self.token_counts(texts)]
        return _in_batches(self._encode, texts, texts, lengths, self.spec.batch_tokens)

    def embed_conversations(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Vectors of rows by id; each turn stands behind its role."""
        if not rows:
            return {}, {}
        vectors = self.embed_texts([conversation_text(row) for row in rows])
        return {row["id"]: v for row, v in zip(rows, vectors, strict=True)}, {}

    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = self._model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )
        # Normalised here in float32: in half precision lengths would be off by 1e-3.
        vectors = vectors.float().cpu().numpy()
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included, before it is cut to `max_length`."""
        if not texts:
            return []
        encoded = self._model.tokenizer(list(texts), truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def fingerprint(self) -> str:
        """Hash of model files, dtype, text length, library versions and our version."""
        return model_fingerprint(
            self.spec,
            "sentence-transformers",
            f"{self._versions}, length {self.max_length}, embedder {versions.EMBEDDER}",
        )

    def close(self) -> None:
        """Frees the model's memory."""
        self._model = None


class EngineEmbedder:
    """Texts embedded by a causal model: the start token, the text, RDS+ pooling."""

    def __init__(self, engine: Engine, batch_tokens: int) -> None:
        self.engine = engine
        self.batch_tokens = batch_tokens
        self.max_length = engine.max_length

    def _tokens(self, text: str) -> list[int]:
        return [start_token(self.engine.tokenizer), *encode(self.engine.tokenizer, text)]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length vectors, float32 (n, d), in the order of the texts.

        Raises:
            ValueError: if there are no texts.
        """
        rows = [self._tokens(text)[: self.max_length] for text in texts]
        lengths = [len(row) for row in rows]
        return _in_batches(self.engine.embed, rows, texts, lengths, self.batch_tokens)

    def embed_conversations(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Vectors of rows by id, templated as the model knows it; reasons of what can't be."""
        asked: dict[str, list[int]] = {}
        failed: dict[str, str] = {}
        for row in rows:
            try:
                asked[row["id"]] = conversation_tokens(
                    self.engine.tokenizer, row, None, self.max_length
                )
            except UnscorableRow as error:
                failed[row["id"]] = error.reason
        if not asked:
            return {}, failed
        tokens = list(asked.values())
        lengths = [len(line) for line in tokens]
        vectors = _in_batches(self.engine.embed, tokens, list(asked), lengths, self.batch_tokens)
        return dict(zip(asked, vectors, strict=True)), failed

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, the start token included, before it is cut to `max_length`."""
        return [len(self._tokens(text)) for text in texts]

    def fingerprint(self) -> str:
        """Hash of the engine's, text length and our version: the store's key has the text alone."""
        return digest(self.engine.fingerprint(), self.max_length, versions.EMBEDDER)

    def close(self) -> None:
        """Closes the engine."""
        self.engine.close()


def open_embedder(spec: ModelSpec) -> TextEmbedder:
    """Loads the embedder of `spec`.

    Raises:
        ValueError: if the model directory is missing or incomplete.
    """
    if spec.engine == "sentence-transformers":
        return SentenceEmbedder(spec)
    return EngineEmbedder(open_engine(spec), spec.batch_tokens)


def _in_batches(
    embed: Callable[[list[Any]], np.ndarray],
    items: Sequence[Any],
    ids: Sequence[str],
    lengths: Sequence[int],
    max_tokens: int,
) -> np.ndarray:
    """Embeds items in planned batches; returns float32 (n, d) in the order of the items."""
    if not items:
        raise ValueError("no texts to embed: a model tells its width only by a vector")
    batches = plan_batches(lengths, ids, max_tokens, MAX_ROWS)
    vectors = np.concatenate([embed([items[i] for i in batch]) for batch in batches])
    out = np.empty_like(vectors)
    out[np.concatenate(batches)] = vectors
    return out


def _versions(*modules: str) -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in modules)


VERSION = 1
RECORD = pa.schema([("key", pa.string()), ("vector", pa.binary())])


def embed_texts(
    recorder: Recorder, bucket: int, texts: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Embeds texts of one store bucket.

    Args:
        recorder: A sentence embedder (`embed_texts`) or an engine (`embed`).
        bucket: Store bucket that all texts belong to.
        texts: Text by id. A causal model reads its start token and the text, as far as its
            `max_length` goes.

    Returns:
        float16 vectors of unit length by id, and reasons by id of those that failed.
    """
    engine = recorder.engine
    if hasattr(engine, "embed_texts"):
        return _asked(recorder, bucket, texts)
    tokens = {
        i: [start_token(engine.tokenizer), *encode(engine.tokenizer, text)][: engine.max_length]
        for i, text in texts.items()
    }
    return _asked(recorder, bucket, tokens)


def embed_conversations(
    recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Embeds whole conversations of one store bucket, roles and all.

    Args:
        recorder: As for `embed_texts`.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.

    Returns:
        As `embed_texts`; a row also fails where the template can't write it.
    """
    engine = recorder.engine
    by_text = hasattr(engine, "embed_texts")
    asked: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            asked[row["id"]] = (
                conversation_text(row)
                if by_text
                else conversation_tokens(
                    engine.tokenizer, row, recorder.spec.template, engine.max_length
                )
            )
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
    found, reasons = _asked(recorder, bucket, asked)
    return found, {**failed, **reasons}


def conversation_tokens(
    tokenizer: Any, row: Mapping[str, Any], template: str | None, max_length: int
) -> list[int]:
    """The templated conversation, as far as `max_length` goes, as RDS+ reads it.

    Raises:
        UnscorableRow: if the template can't write it, or leaves a part of it out.
    """
    tokens, _ = response_span(tokenizer, row["messages"], template, tools=row["tools"])
    return tokens[:max_length]


def conversation_text(row: Mapping[str, Any]) -> str:
    """A conversation for a model that knows no template: each turn behind its role."""
    turns = [f"tools: {row['tools']}"] if row["tools"] else []
    for turn in row["messages"]:
        parts = [turn.get(k) for k in ("reasoning_content", "reasoning", "content", "tool_calls")]
        turns.append(f"{turn['role']}: " + "\n".join(str(part) for part in parts if part))
    return "\n".join(turns)


def _asked(
    recorder: Recorder, bucket: int, items: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Vectors of texts or of lists of tokens by id, and reasons by id."""
    engine = recorder.engine
    questions: dict[str, tuple[int, Any]] = {}
    keys: dict[str, str] = {}
    for identity, item in items.items():
        by_text = isinstance(item, str)
        key = score_key([], item) if by_text else score_key(item)
        questions[key] = (max(1, len(item) // 4) if by_text else len(item), item)
        keys[identity] = key

    def answer(asked: Sequence[Any]) -> list[dict[str, Any] | str]:
        embed = engine.embed_texts if hasattr(engine, "embed_texts") else engine.embed
        return [{"vector": v.astype("<f2").tobytes()} for v in embed(list(asked))]

    records, reasons = recorder.ask("embedding", VERSION, {}, RECORD, bucket, questions, answer)
    raw = dict(zip(records["key"].to_list(), records["vector"].to_list(), strict=True))
    found = {i: np.frombuffer(raw[key], "<f2") for i, key in keys.items() if key in raw}
    return found, {i: reasons[key] for i, key in keys.items() if key in reasons}
