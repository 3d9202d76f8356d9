"""Embeddings of prompts, by a named embedding model or by a causal model's own hidden states.

A causal model pools its last hidden states with weights 1..L (RDS+, arXiv 2503.01807), which needs
no second model. Vectors are recorded as float16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import encode, start_token
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
    by_text = hasattr(engine, "embed_texts")
    questions: dict[str, tuple[int, Any]] = {}
    keys: dict[str, str] = {}
    for identity, text in texts.items():
        if by_text:
            key, question, length = score_key([], text), text, max(1, len(text) // 4)
        else:
            tokens = [start_token(engine.tokenizer), *encode(engine.tokenizer, text)]
            tokens = tokens[: engine.max_length]
            key, question, length = score_key(tokens), tokens, len(tokens)  # type: ignore[assignment]
        questions[key] = (length, question)
        keys[identity] = key

    def answer(asked: Sequence[Any]) -> list[dict[str, Any] | str]:
        vectors = engine.embed_texts(list(asked)) if by_text else engine.embed(list(asked))
        return [{"vector": v.astype("<f2").tobytes()} for v in vectors]

    records, reasons = recorder.ask("embedding", VERSION, {}, RECORD, bucket, questions, answer)
    raw = dict(zip(records["key"].to_list(), records["vector"].to_list(), strict=True))
    found = {i: np.frombuffer(raw[key], "<f2") for i, key in keys.items() if key in raw}
    return found, {i: reasons[key] for i, key in keys.items() if key in reasons}
