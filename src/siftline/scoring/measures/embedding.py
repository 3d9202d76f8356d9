"""Embeddings of texts and of conversations, by an embedding model or a causal model's own states.

A causal model pools its last hidden states with weights 1..L (RDS+, arXiv 2503.01807), which needs
no second model. It reads a text behind its start token, and a conversation as it is templated, with
roles and ends of turns. Vectors are recorded as float16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, encode, response_span, start_token
from siftline.store.store import score_key

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
