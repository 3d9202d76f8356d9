"""Accuracy of a model on questions with answers: overall, by level, and over seeds.

Generation is greedy by default and runs in planned batches, so a result does not depend on the
order of the questions. An answer counts only if the verifier says it is right: one that it can't
judge, or a question too long for the model, is not correct and says so in `reason`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from siftline.kernels.draws import hash64
from siftline.scoring.batching import plan_batches
from siftline.scoring.engines import Engine, Failed, Sampling
from siftline.scoring.spans import UnscorableRow, prompt_tokens
from siftline.training.intervals import Interval, crossed_interval, paired_difference, wilson

if TYPE_CHECKING:
    from siftline.scoring.verifiers import Verifier

RESULT = {
    "id": pl.String,
    "level": pl.String,
    "response": pl.String,
    "correct": pl.Boolean,
    "reason": pl.String,  # the verifier's, or too_long, template_error
    "finish_reason": pl.String,  # stop, length; null where nothing was generated
}
OVERALL = "all"
FLOOR = 0.02
"""Accuracy a model must clearly exceed: a few lucky answers say nothing about a method."""


@dataclass(frozen=True)
class Evaluation:
    """How to ask.

    Attributes:
        max_new_tokens: Most tokens of an answer; 512 is lm-evaluation-harness's order of size.
        temperature: 0 takes the most likely token, as accuracy tables do.
        verifier: Who judges the answers: a name that `scoring.verifiers.get_verifier` knows.
        level_column: Column with the level of difficulty; a frame without it has no levels.
        batch_tokens: Most tokens of a planned batch, prompt and answer, padding included.
        batch_rows: Most questions of a planned batch.
        seed: Of the draws, when temperature is above 0.
        retained: Names of test sets of tasks that the base model could do before; they are told
            apart, with the change against it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    verifier: str = "math"
    level_column: str = "level"
    batch_tokens: int = 65536
    batch_rows: int = 256
    seed: int = 0
    retained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: it must be finite, 0 or above")

    def input_columns(self) -> tuple[str, ...]:
        """The column of a test set's input that says how hard a question is."""
        return (self.level_column,)


def evaluate(
    engine: Engine,
    rows: pl.DataFrame,
    verifier: "Verifier",
    config: Evaluation,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pl.DataFrame:
    """Asks every question once and checks the answer.

    Args:
        engine: The model.
        rows: Columns id, messages (a last assistant turn, the solution, is left off), answer, and
            optionally tools and the level column.
        verifier: Judges (response, answer).
        config: How to ask.
        progress: Called with (questions done, questions in all) after every batch.

    Returns:
        One line per question in the columns of `RESULT`, sorted by id.

    Raises:
        ValueError: if an id comes twice, or a question has no answer.
    """
    _check(rows)
    lines: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for row in rows.iter_rows(named=True):
        level = row.get(config.level_column)
        line = {"id": row["id"], "level": None if level is None else str(level)}
        try:
            prompt = prompt_tokens(
                engine.tokenizer,
                row["messages"],
                tools=row.get("tools"),
                max_length=engine.max_length,
            )
        except UnscorableRow as error:
            lines.append({**line, "response": None, "correct": False, "reason": error.reason})
            continue
        asked.append({**line, "answer": row["answer"]})
        prompts.append(prompt)
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    ids = [line["id"] for line in asked]
    room = config.max_new_tokens
    lengths = [min(len(prompt) + room, engine.max_length) for prompt in prompts]
    done = len(lines)
    for batch in plan_batches(lengths, ids, config.batch_tokens, config.batch_rows):
        seeds = [[hash64(config.seed, "evaluate", ids[i])] for i in batch]
        drawn = engine.generate([prompts[i] for i in batch], seeds, sampling)
        for i, (generation,) in zip(batch, drawn, strict=True):
            if isinstance(generation, Failed):
                raise RuntimeError(
                    f"question {ids[i]} got no answer ({generation.reason}): an accuracy over the "
                    "others would mislead; run again"
                )
            answer = asked[i].pop("answer")
            verdict = verifier(generation.text, answer)
            judged = {"correct": verdict.correct is True, "reason": verdict.reason}
            text = {"response": generation.text, "finish_reason": generation.finish_reason}
            lines.append({**asked[i], **judged, **text})
        done += len(batch)
        progress(done, rows.height)
    return pl.DataFrame(lines, schema=RESULT).sort("id")


def _check(rows: pl.DataFrame) -> None:
    if rows["id"].n_unique() != rows.height:
        raise ValueError(
            f"{rows.height - rows['id'].n_unique()} ids come twice: give one row an id"
        )
    unanswered = rows["answer"].null_count()
    if unanswered:
        raise ValueError(f"{unanswered} questions have no answer: leave them out of an evaluation")


def _by_level(results: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """The whole frame under `OVERALL`, then each level in order, numbers by value."""
    levels = results["level"].drop_nulls().unique().to_list()
    try:
        levels.sort(key=float)
    except ValueError:
        levels.sort()
    return [(OVERALL, results), *((level, results.filter(level=level)) for level in levels)]


def at_floor(interval: Interval, guess: float = 0.0) -> bool:
    """Whether an accuracy can't be told from guessing, or from `FLOOR` where that is higher.

    Differences between models at the floor say nothing about how they were trained.
    """
    return interval.low <= max(guess, FLOOR)


def summarise_accuracy(
    results: pl.DataFrame, *, guess: float = 0.0, confidence: float = 0.95
) -> pl.DataFrame:
    """Accuracy of one run, overall and by level, with Wilson intervals.

    Args:
        results: As `evaluate` returns them.
        guess: Accuracy of a model that guesses, say 0.25 with four choices.
        confidence: Coverage of the intervals.

    Returns:
        level (`all` first), n, correct, accuracy, low, high, at_floor.

    Raises:
        ValueError: if there are no results.
    """
    lines = []
    for level, part in _by_level(results):
        correct = int(part["correct"].sum())
        interval = wilson(correct, part.height, confidence)
        lines.append(
            {
                "level": level,
                "n": part.height,
                "correct": correct,
                "accuracy": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "at_floor": at_floor(interval, guess),
            }
        )
    return pl.DataFrame(lines)


def _table(runs: Sequence[pl.DataFrame]) -> np.ndarray:
    """Correctness of k runs on the same n questions, float64, shape (k, n)."""
    ordered = [run.sort("id") for run in runs]
    for run in ordered[1:]:
        if not run["id"].equals(ordered[0]["id"]):
            raise ValueError("runs answer different questions: evaluate all on one test set")
    return np.stack([run["correct"].to_numpy().astype(np.float64) for run in ordered])


def _clipped(interval: Interval) -> Interval:
    return Interval(interval.estimate, max(0.0, interval.low), min(1.0, interval.high))


def summarise_seeds(
    runs: Sequence[pl.DataFrame], *, guess: float = 0.0, confidence: float = 0.95
) -> pl.DataFrame:
    """Mean accuracy over training seeds, overall and by level.

    The interval is `crossed_interval`: it says where the mean over other seeds and other questions
    of the same kind would lie. A level with a single question has none (null).

    Args:
        runs: Results of each seed on the same questions, two or more.
        guess: Accuracy of a model that guesses.
        confidence: Coverage of the intervals.

    Returns:
        level (`all` first), seeds, n, accuracy, low, high, lowest, highest (over seeds), at_floor.

    Raises:
        ValueError: if there are fewer than two runs, or they answer different questions.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run: intervals over seeds need 2 or more")
    grouped = [dict(_by_level(run)) for run in runs]
    lines = []
    for level in grouped[0]:
        table = _table([group.get(level, runs[0].clear()) for group in grouped])
        means = table.mean(axis=1)
        known = table.shape[1] > 1
        interval = _clipped(crossed_interval(table, confidence)) if known else None
        lines.append(
            {
                "level": level,
                "seeds": len(runs),
                "n": table.shape[1],
                "accuracy": float(means.mean()),
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "lowest": float(means.min()),
                "highest": float(means.max()),
                "at_floor": at_floor(interval, guess) if interval else None,
            }
        )
    return pl.DataFrame(lines)


def compare(
    first: Sequence[pl.DataFrame],
    second: Sequence[pl.DataFrame],
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Difference in accuracy, first arm minus second, paired by seed and question.

    With one run each it is the paired bootstrap over questions; with more, `crossed_interval` of
    the differences.

    Args:
        first: Results of one arm, a run per seed.
        second: Results of the other, seeds in the same order.
        seed: Seed of the bootstrap.
        confidence: Coverage.

    Raises:
        ValueError: if the arms have different numbers of runs, or answer different questions.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} runs against {len(second)}: give the same seeds of both")
    table = _table([*first, *second])
    one, other = table[: len(first)], table[len(first) :]
    if len(first) > 1:
        return crossed_interval(one - other, confidence)
    ids = first[0].sort("id")["id"].to_list()
    return paired_difference(ids, one[0], other[0], seed=seed, confidence=confidence)
