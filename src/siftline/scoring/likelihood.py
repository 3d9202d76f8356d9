"""Response log-probabilities as recorded facts, with and without their prompt.

The sums are recorded; means, perplexity and the two IFDs are arithmetic on them. Perplexity is
exp(-mean log-probability) over the response's tokens, end of turn included.

IFD goes by one name for two numbers in the literature, which rank rows differently. Here
`ifd_loss_ratio` is the ratio of mean losses (Cherry LLM, arXiv 2308.12032) and
`ifd_perplexity_ratio` that of perplexities (Superfiltering, arXiv 2402.00530), each conditional
over unconditional.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.scoring.engines import (
    DETAILS,
    Detail,
    Engine,
    Failed,
    Inspection,
    Span,
    check_details,
)
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import Turns, UnscorableRow, response_span, unconditional
from siftline.store import score_key

VERSION = 1
RECORD = pa.schema([("key", pa.string()), ("n_tokens", pa.int32()), ("logprob_sum", pa.float64())])
DETAIL_FIELDS = {
    "entropy": pa.field("entropy_sum", pa.float64()),
    "top1": pa.field("top1_count", pa.int32()),
    "pooled": pa.field("pooled", pa.binary()),
}
"""What a detail is recorded as. `pooled` is a little-endian float16 vector of unit length."""
COLUMNS: dict[str, Any] = {
    "id": pl.String,
    "key": pl.String,
    "n_tokens": pl.Int32,
    "logprob_sum": pl.Float64,
    "logprob_mean": pl.Float64,
    "logprob_mean_unconditional": pl.Float64,
    "perplexity": pl.Float64,
    "ifd_loss_ratio": pl.Float64,
    "ifd_perplexity_ratio": pl.Float64,
    "entropy_mean": pl.Float64,
    "top1_rate": pl.Float64,
    "pooled": pl.Binary,
}
"""The last three are null unless asked for. Means are nats a token; a perplexity above 1e308 is
infinite."""


@dataclass(frozen=True)
class Likelihood:
    """What is scored of a row.

    Attributes:
        turns: The last assistant turn, or all of them. Training here learns the last.
        details: What else the conditional pass reports: mean `entropy` of the predictions, `top1`
            rate, or the row's `pooled` hidden state (RDS+). Of the vocabulary's statistics vllm and
            server know top1 at most.
    """

    turns: Turns = "last"
    details: tuple[Detail, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.details) - set(DETAILS))
        if unknown:
            raise ValueError(f"details {unknown}: choose from {', '.join(DETAILS)}")

    @property
    def parameters(self) -> dict[str, Any]:
        """What moves the records; the turns are in the key."""
        return {"details": sorted(set(self.details))} if self.details else {}

    @property
    def record(self) -> pa.Schema:
        """Columns of a record of the conditional pass."""
        wanted = sorted(set(self.details))
        return pa.schema([*RECORD, *(DETAIL_FIELDS[detail] for detail in wanted)])


PLAIN = Likelihood()
Question = tuple[list[int], Span]


def score_likelihood(
    recorder: Recorder, bucket: int, rows: pa.Table, asked: Likelihood = PLAIN
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Scores the responses of one store bucket.

    Args:
        recorder: The target model.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.
        asked: Which turns, and what beside the log-probability.

    Returns:
        One line of `COLUMNS` per scored row, sorted by id; and by id the reasons of the others
        (`too_long`, `template_error`, `not_finite`, or what the engine says).

    Raises:
        ValueError: if the engine gives no such details, or refuses all rows of a batch.
    """
    # Before any row is asked: the engine's refusal would else be taken for that of single rows.
    if asked.details:
        check_details(recorder.spec.engine, asked.details, recorder.engine.details)
    given: dict[str, tuple[int, Question]] = {}
    alone: dict[str, tuple[int, Question]] = {}
    keys: dict[str, tuple[str, str]] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            question = _question(recorder, row, asked)
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
            continue
        twin = unconditional(recorder.engine.tokenizer, *question)
        pair = score_key(question[0], *question[1]), score_key(twin[0], *twin[1])
        given[pair[0]] = (len(question[0]), question)
        alone[pair[1]] = (len(twin[0]), twin)
        keys[row["id"]] = pair
    passes = _passes(recorder, bucket, given, alone, asked)
    lines = []
    for identity, pair in sorted(keys.items()):
        found = [records.get(key) for key, (records, _) in zip(pair, passes, strict=True)]
        lacking = [
            reasons[key] for key, (_, reasons) in zip(pair, passes, strict=True) if key in reasons
        ]
        if found[0] is None or found[1] is None:
            failed[identity] = lacking[0]
            continue
        lines.append(_line(identity, found[0], found[1]))
    return pl.DataFrame(lines, schema=COLUMNS), failed


def _question(recorder: Recorder, row: dict[str, Any], asked: Likelihood) -> Question:
    return response_span(
        recorder.engine.tokenizer,
        row["messages"],
        recorder.spec.template,
        tools=row["tools"],
        max_length=recorder.engine.max_length,
        turns=asked.turns,
    )


Pass = tuple[dict[str, dict[str, Any]], dict[str, str]]
"""Records by key, and reasons by key of questions without one."""


def _passes(
    recorder: Recorder,
    bucket: int,
    given: dict[str, tuple[int, Question]],
    alone: dict[str, tuple[int, Question]],
    asked: Likelihood,
) -> tuple[Pass, Pass]:
    """The pass with prompts and the one without; one call does both unless details are asked for.

    Details cost a namespace of their own. There a plain text is asked twice under one key, so the
    answers of the two passes must not be mixed.
    """

    def ask(of: Likelihood, questions: dict[str, tuple[int, Question]]) -> Pass:
        found, lacking = recorder.ask(
            "likelihood",
            VERSION,
            of.parameters,
            of.record,
            bucket,
            questions,
            _scorer(recorder.engine, tuple(sorted(set(of.details)))),
        )
        return {record["key"]: record for record in found.to_dicts()}, lacking

    if not asked.details:
        both = ask(PLAIN, given | alone)
        return both, both
    without = ask(PLAIN, alone)
    return ask(asked, given), without


def _line(identity: str, given: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    tokens = given["n_tokens"]
    mean, free = given["logprob_sum"] / tokens, alone["logprob_sum"] / alone["n_tokens"]
    entropy, top1 = given.get("entropy_sum"), given.get("top1_count")
    return {
        "id": identity,
        "key": given["key"],
        "n_tokens": tokens,
        "logprob_sum": given["logprob_sum"],
        "logprob_mean": mean,
        "logprob_mean_unconditional": free,
        "perplexity": _exp(-mean),
        # A response the model is certain of without any prompt has no ratio.
        "ifd_loss_ratio": mean / free if free else None,
        "ifd_perplexity_ratio": _exp(free - mean),
        "entropy_mean": None if entropy is None else entropy / tokens,
        "top1_rate": None if top1 is None else top1 / tokens,
        "pooled": given.get("pooled"),
    }


def _exp(value: float) -> float:
    """exp; infinity where a float64 ends, for a response that a model all but rules out."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _scorer(engine: Engine, details: Sequence[Detail]) -> Any:
    def answer(asked: Sequence[Question]) -> list[dict[str, Any] | str]:
        tokens, spans = [row for row, _ in asked], [span for _, span in asked]
        return [_record(found) for found in engine.inspect(tokens, spans, details)]

    return answer


def _record(found: Inspection | Failed) -> dict[str, Any] | str:
    if isinstance(found, Failed):
        return found.reason
    total = float(np.sum(found.logprobs, dtype=np.float64))
    if not np.isfinite(total):
        return "not_finite"
    record: dict[str, Any] = {"n_tokens": len(found.logprobs), "logprob_sum": total}
    if found.entropy is not None:
        record["entropy_sum"] = float(np.sum(found.entropy, dtype=np.float64))
    if found.top1 is not None:
        record["top1_count"] = int(found.top1.sum())
    if found.pooled is not None:
        record["pooled"] = found.pooled.astype("<f2").tobytes()
    return record
