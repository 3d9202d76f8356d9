"""An engine with the store its answers are kept in.

Every question to a model goes through `Recorder.ask`: it is keyed by its tokens, planned into
batches by length before anything runs, committed batch by batch, and never asked again.

Reasons for having no answer: those that lie in the question, and those worth another try.

What an engine gives that takes new draws while others are under way.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import polars as pl
import pyarrow as pa

from siftline.scoring.engines.base import Failed, Generation, ModelSpec, Sampling
from siftline.scoring.engines.batching import plan_batches
from siftline.scoring.templates import OMISSIONS
from siftline.store.store import Namespace, Store, collect

FINAL = frozenset({"too_long", "template_error", *OMISSIONS, "no_text", "cut", "empty"})
"""The same question would have the same reason again. All others (a refusal, a lost connection, a
reply that can't be read) may end with the next run."""


def unanswered(reasons: Iterable[str]) -> int:
    """How many of the reasons are not final: a stage with such ones is not done."""
    return sum(reason not in FINAL for reason in reasons)


logger = logging.getLogger(__name__)
Question = TypeVar("Question")
REFUSED = "refused"
"""Reason of a row that the engine refuses while it accepts others; the log says why."""
ASKED_OF_ONE = 4
"""One row may be asked so many questions (two orders, two ways to reflect): refusing them all says
nothing of the others."""
MAX_ROWS = 256
"""Most questions of one planned batch, and so the most that a killed run computes again."""


@dataclass
class Tally:
    """What a recorder's questions cost: asked of the model now, or found in the store.

    `tokens` are those of the computed questions, without padding.
    """

    computed: int = 0
    found: int = 0
    failed: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Recorder:
    """Asks one model and records the answers.

    Attributes:
        engine: The model (`engines.Engine`, or an embedder with `fingerprint`).
        spec: How it is run: template, lengths and batch size.
        root: The store's folder.
        progress: Takes questions done, and tokens that the model ran for them.
        tally: Running counts over all questions.
    """

    engine: Any
    spec: ModelSpec
    root: Path
    progress: Callable[[int, int], None] = lambda rows, tokens: None
    tally: Tally = field(default_factory=Tally)

    def ask(
        self,
        scorer: str,
        version: int,
        parameters: dict[str, Any],
        schema: pa.Schema,
        bucket: int,
        questions: Mapping[str, tuple[int, Question]],
        answer: Callable[[Sequence[Question]], list[dict[str, Any] | str]],
        order: Mapping[str, str] | None = None,
    ) -> tuple[pl.DataFrame, dict[str, str]]:
        """Answers questions from the store, and from the model where it has none.

        Args:
            scorer: Name and version of what is asked for; with `parameters` and the engine's
                fingerprint they make the store's namespace.
            version: Raise it when the same question would get another answer.
            parameters: JSON.
            schema: Columns of an answer, `key` first.
            bucket: Store bucket of these questions.
            questions: By key: tokens the question takes in a batch, and the question.
            answer: Answers a batch; a string is the reason for having no answer.
            order: Plan order by key among questions of equal length; by default the key.

        Returns:
            Answers with their key, and the reasons of the failed by key.
        """
        namespace = Namespace(scorer, version, self.engine.fingerprint(), parameters)
        store = Store(self.root, namespace, schema)
        keys = list(questions)
        lengths = [questions[key][0] for key in keys]
        names = [order[key] for key in keys] if order else keys
        batches = plan_batches(lengths, names, self.spec.batch_tokens, MAX_ROWS)
        before = self.tally.tokens
        answers = self.tally.computed + self.tally.found - self.tally.failed

        def compute(positions: list[int]) -> tuple[pa.Table, dict[str, str]]:
            nonlocal answers
            asked = [keys[i] for i in positions]
            self.tally.tokens += sum(lengths[i] for i in positions)
            lines, reasons = [], {}
            given_all = accepted(answer, [questions[k][1] for k in asked], proven=answers > 0)
            for key, given in zip(asked, given_all, strict=True):
                if isinstance(given, str):
                    reasons[key] = given
                else:
                    lines.append({"key": key, **given})
            answers += len(lines)
            return pa.Table.from_pylist(lines, schema=schema), reasons

        def done(rows: int) -> None:
            nonlocal before
            self.progress(rows, self.tally.tokens - before)
            before = self.tally.tokens

        got = collect(store, bucket, keys, batches, compute, done)
        self.tally.computed += got.computed
        self.tally.found += got.found
        self.tally.failed += len(got.failed)
        return got.records, got.failed

    def known(
        self,
        scorer: str,
        version: int,
        parameters: dict[str, Any],
        schema: pa.Schema,
        bucket: int,
        keys: Collection[str],
    ) -> dict[str, dict[str, Any]]:
        """Those of some answers that a bucket of the store has, by key: found, nothing is asked."""
        namespace = Namespace(scorer, version, self.engine.fingerprint(), parameters)
        records = Store(self.root, namespace, schema).read(bucket)
        found = records.filter(pl.col("key").is_in(list(keys))).to_dicts()
        self.tally.found += len(found)
        self.progress(len(found), 0)
        return {record["key"]: record for record in found}


def accepted(
    answer: Callable[[Sequence[Question]], list[dict[str, Any] | str]],
    batch: Sequence[Question],
    proven: bool = False,
) -> list[dict[str, Any] | str]:
    """Answers of a batch in which a row may be one the engine refuses.

    A refused batch is asked in halves, down to the refused row, whose reason is then `refused`.

    Args:
        answer: Answers a batch, or refuses it with a `ValueError`.
        batch: Questions.
        proven: Whether the engine has answered such questions: then the rows are at fault, however
            many of a batch they are.

    Raises:
        ValueError: if an engine that has not answered yet refuses more questions than one row
            has, and answers none: then the call is wrong, not a row.
    """
    out, refusal = _halved(answer, batch)
    several = len(batch) > ASKED_OF_ONE
    if refusal and several and not proven and all(given == REFUSED for given in out):
        raise refusal
    return out


def _halved(
    answer: Callable[[Sequence[Question]], list[dict[str, Any] | str]], batch: Sequence[Question]
) -> tuple[list[dict[str, Any] | str], ValueError | None]:
    try:
        return answer(batch), None
    except ValueError as error:
        refusal = error
    if len(batch) == 1:
        logger.warning("row refused: %s", refusal)
        return [REFUSED], refusal
    middle = (len(batch) + 1) // 2
    left, _ = _halved(answer, batch[:middle])
    right, _ = _halved(answer, batch[middle:])
    return left + right, refusal


Ask = tuple[Any, Sequence[int], int]
"""One draw to make: what its maker calls it, the prompt's token ids, the seed."""
Pull = Callable[[int, bool], list[Ask]]
"""Takes free slots and whether nothing of the engine's is under way; gives at most so many draws.
Nothing to do while nothing is under way ends the stream."""


@runtime_checkable
class Streaming(Protocol):
    """An engine that takes new draws while others are under way."""

    @property
    def slots(self) -> int:
        """Draws that it works on at a time."""
        ...

    def stream(self, pull: Pull, sampling: Sampling) -> Iterator[tuple[Any, "Generation | Failed"]]:
        """Yields each draw that `pull` gave as it ends, with its name.

        Raises:
            ValueError: if a draw is refused before it begins; those under way are dropped.
        """
        ...


def fitting(asked: list[Ask], max_length: int) -> tuple[list[Ask], list[tuple[Any, Failed]]]:
    """The draws whose prompts leave room for a token, and the others as refused."""
    fits = [ask for ask in asked if 0 < len(ask[1]) < max_length]
    others = [ask for ask in asked if not 0 < len(ask[1]) < max_length]
    return fits, [(name, Failed(REFUSED)) for name, _, _ in others]
