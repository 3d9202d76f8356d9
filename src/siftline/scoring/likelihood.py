"""Mean log-probability of responses under the target model, with and without their prompt.

The sums are recorded facts; means, perplexity and whatever ratio a recipe wants are arithmetic on
them. Perplexity is exp(-mean log-probability) over the response's tokens, end of turn included.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import Span, UnscorableRow, response_span, unconditional
from siftline.store import score_key

VERSION = 1
RECORD = pa.schema([("key", pa.string()), ("n_tokens", pa.int32()), ("logprob_sum", pa.float64())])
COLUMNS = {
    "id": pl.String,
    "key": pl.String,
    "n_tokens": pl.Int32,
    "logprob_sum": pl.Float64,
    "logprob_mean": pl.Float64,
    "logprob_mean_unconditional": pl.Float64,
    "perplexity": pl.Float64,
}


def score_likelihood(
    recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Scores the responses of one store bucket.

    Args:
        recorder: The target model.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.

    Returns:
        One line of `COLUMNS` per scored row, sorted by id; and by id the reasons of the others
        (`too_long`, `template_error`, `not_finite`, or what the engine says).
    """
    tokenizer, spec = recorder.engine.tokenizer, recorder.spec
    questions: dict[str, tuple[int, tuple[list[int], Span]]] = {}
    keys: dict[str, tuple[str, str]] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            tokens, span = response_span(
                tokenizer,
                row["messages"],
                spec.template,
                tools=row["tools"],
                max_length=spec.max_length,
            )
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
            continue
        pair = []
        for asked, at in ((tokens, span), unconditional(tokenizer, tokens, span)):
            key = score_key(asked, *at)
            questions[key] = (len(asked), (asked, at))
            pair.append(key)
        keys[row["id"]] = (pair[0], pair[1])
    records, reasons = recorder.ask(
        "likelihood", VERSION, {}, RECORD, bucket, questions, _scorer(recorder.engine)
    )
    by_key = {r["key"]: r for r in records.to_dicts()}
    lines = []
    for identity, (with_prompt, alone) in sorted(keys.items()):
        missing = next((k for k in (with_prompt, alone) if k not in by_key), None)
        if missing is not None:
            failed[identity] = reasons[missing]
            continue
        lines.append(_line(identity, by_key[with_prompt], by_key[alone]))
    return pl.DataFrame(lines, schema=COLUMNS), failed


def _line(identity: str, given: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    mean = given["logprob_sum"] / given["n_tokens"]
    return {
        "id": identity,
        "key": given["key"],
        "n_tokens": given["n_tokens"],
        "logprob_sum": given["logprob_sum"],
        "logprob_mean": mean,
        "logprob_mean_unconditional": alone["logprob_sum"] / alone["n_tokens"],
        "perplexity": float(np.exp(-mean)),
    }


def _scorer(engine: Any) -> Any:
    def answer(asked: Sequence[tuple[list[int], Span]]) -> list[dict[str, Any] | str]:
        scored = engine.score([tokens for tokens, _ in asked], [span for _, span in asked])
        out: list[dict[str, Any] | str] = []
        for logprobs in scored:
            total = float(np.sum(logprobs, dtype=np.float64))
            finite = {"n_tokens": len(logprobs), "logprob_sum": total}
            out.append(finite if np.isfinite(total) else "not_finite")
        return out

    return answer
