"""Response log-probabilities as recorded facts, with and without their prompt.

The sums are recorded; means, perplexity and the two IFDs are arithmetic on them. Perplexity is
exp(-mean log-probability) over the response's tokens, end of turn included.

IFD goes by one name for two numbers in the literature, which rank rows differently. Here
`ifd_loss_ratio` is the ratio of mean losses (Cherry LLM, arXiv 2308.12032) and
`ifd_perplexity_ratio` that of perplexities (Superfiltering, arXiv 2402.00530), each conditional
over unconditional.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.rows.schema import bucket_of
from siftline.scoring.engines.base import (
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
from siftline.store.store import BUCKETS, score_key

NAME, VERSION = "likelihood", 1
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
Reasons = dict[str, str]
GIVEN: dict[str, Any] = {
    "id": pl.String,
    "key": pl.String,
    "alone": pl.String,
    "n_tokens": pl.Int32,
    "logprob_sum": pl.Float64,
    "entropy_sum": pl.Float64,
    "top1_count": pl.Int32,
    "pooled": pl.Binary,
    "reason": pl.String,
    "n_alone": pl.Int32,
    "logprob_alone": pl.Float64,
}
"""Columns of `score_given`: the key of the response alone and, where it was found already, its
tokens and log-probability. `reason` says why a row has no score with its prompt."""
ALONE: dict[str, Any] = {"key": pl.String, "n_tokens": pl.Int32, "logprob_sum": pl.Float64}


def score_likelihood(
    recorder: Recorder, bucket: int, rows: pa.Table, asked: Likelihood = PLAIN
) -> tuple[pl.DataFrame, Reasons]:
    """Scores the responses of one store bucket.

    Equal responses of several buckets are one question when they are asked without their prompts;
    who scores a whole pool asks it once (`stages.scores`).

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
    given, failed, alone = score_given(recorder, bucket, rows, asked)
    answers = [pl.DataFrame(schema=ALONE)]
    lacking: Reasons = {}
    for home in sorted({alone_bucket(key) for key in alone}):
        here = {key: question for key, question in alone.items() if alone_bucket(key) == home}
        found, reasons = score_alone(recorder, home, here)
        answers.append(found)
        lacking |= reasons
    lines, lost = joined(given, pl.concat(answers), lacking)
    return lines, failed | lost


def alone_bucket(key: str) -> int:
    """Store bucket of a response without its prompt: by its own key, whatever row it is of."""
    return bucket_of(key, BUCKETS)


def score_given(
    recorder: Recorder, bucket: int, rows: pa.Table, asked: Likelihood = PLAIN
) -> tuple[pl.DataFrame, Reasons, dict[str, Question]]:
    """Scores the responses of one store bucket behind their prompts.

    Returns:
        Columns of `GIVEN`, sorted by id; by id the reasons of rows that can't be asked; and by key
        the questions without prompts that are still to be asked. Earlier versions recorded those in
        the bucket of the row: what lies there is found.

    Raises:
        ValueError: as `score_likelihood`.
    """
    # Before any row is asked: the engine's refusal would else be taken for that of single rows.
    if asked.details:
        check_details(recorder.spec.engine, asked.details, recorder.engine.details)
    given: dict[str, tuple[int, Question]] = {}
    alone: dict[str, Question] = {}
    keys: dict[str, tuple[str, str]] = {}
    failed: Reasons = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            question = _question(recorder, row, asked)
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
            continue
        twin = unconditional(recorder.engine.tokenizer, *question)
        pair = score_key(question[0], *question[1]), score_key(twin[0], *twin[1])
        given[pair[0]] = (len(question[0]), question)
        alone[pair[1]] = twin
        keys[row["id"]] = pair
    found, lacking = _ask(recorder, bucket, given, asked)
    known = recorder.known(NAME, VERSION, PLAIN.parameters, PLAIN.record, bucket, alone)
    if not asked.details:
        # A text without a prompt is the same question both ways.
        known |= {key: found[key] for key in alone.keys() & found.keys()}
    lines = []
    for identity, (key, free) in sorted(keys.items()):
        line = {"id": identity, "key": key, "alone": free, "reason": lacking.get(key)}
        line |= {n: v for n, v in found.get(key, {}).items() if n != "key"}
        if free in known:
            twice = {
                "n_alone": known[free]["n_tokens"],
                "logprob_alone": known[free]["logprob_sum"],
            }
            line |= twice
        lines.append(line)
    left = {key: question for key, question in alone.items() if key not in known}
    if not asked.details:
        left = {key: question for key, question in left.items() if key not in lacking}
    return pl.DataFrame(lines, schema=GIVEN), failed, left


def score_alone(
    recorder: Recorder, bucket: int, questions: Mapping[str, Question]
) -> tuple[pl.DataFrame, Reasons]:
    """Scores responses without their prompts.

    Args:
        recorder: The target model.
        bucket: Their `alone_bucket`.
        questions: By key.

    Returns:
        Columns of `ALONE`, and reasons by key of those without an answer.
    """
    sized = {key: (len(question[0]), question) for key, question in questions.items()}
    found, reasons = _ask(recorder, bucket, sized, PLAIN)
    lines = [found[key] for key in sorted(found)]
    return pl.DataFrame(lines, schema=ALONE), reasons


def joined(
    given: pl.DataFrame, alone: pl.DataFrame, lacking: Mapping[str, str]
) -> tuple[pl.DataFrame, Reasons]:
    """Lines of `COLUMNS` from both halves, and reasons by id of rows that lack one.

    Args:
        given: Columns of `GIVEN`.
        alone: Columns of `ALONE`, keys distinct.
        lacking: Reasons by key of responses without an answer.
    """
    records = {key: (tokens, total) for key, tokens, total in alone.rows()}
    lines, failed = [], {}
    for row in given.sort("id").to_dicts():
        free = (row["n_alone"], row["logprob_alone"])
        if free[0] is None:
            free = records.get(row["alone"], free)
        if row["n_tokens"] is None or free[0] is None:
            failed[row["id"]] = row["reason"] or lacking[row["alone"]]
        else:
            lines.append(_line(row, free[1] / free[0]))
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


def _ask(
    recorder: Recorder, bucket: int, questions: Mapping[str, tuple[int, Question]], of: Likelihood
) -> tuple[dict[str, dict[str, Any]], Reasons]:
    """Records by key, and reasons by key of questions without one."""
    found, lacking = recorder.ask(
        NAME,
        VERSION,
        of.parameters,
        of.record,
        bucket,
        questions,
        _scorer(recorder.engine, tuple(sorted(set(of.details)))),
    )
    return {record["key"]: record for record in found.to_dicts()}, lacking


def _line(row: dict[str, Any], free: float) -> dict[str, Any]:
    """One line of `COLUMNS`; `free` is the mean log-probability without the prompt."""
    tokens = row["n_tokens"]
    mean = row["logprob_sum"] / tokens
    entropy, top1 = row["entropy_sum"], row["top1_count"]
    return {
        "id": row["id"],
        "key": row["key"],
        "n_tokens": tokens,
        "logprob_sum": row["logprob_sum"],
        "logprob_mean": mean,
        "logprob_mean_unconditional": free,
        "perplexity": _exp(-mean),
        # A response the model is certain of without any prompt has no ratio.
        "ifd_loss_ratio": mean / free if free else None,
        "ifd_perplexity_ratio": _exp(free - mean),
        "entropy_mean": None if entropy is None else entropy / tokens,
        "top1_rate": None if top1 is None else top1 / tokens,
        "pooled": row["pooled"],
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
