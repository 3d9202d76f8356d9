"""A model as judge: a choice among a few texts, a grade by a rubric."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa

from siftline.rows.schema import text_view
from siftline.scoring.engines.base import NO_SCORES
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, response_span
from siftline.store.store import score_key

RECORD = pa.schema([("key", pa.string()), ("logprobs", pa.list_(pa.float32()))])
Choice = tuple[list[int], list[list[int]]]
"""Token ids of a prompt, and of each option behind it."""


def choice_question(
    recorder: Recorder,
    messages: Sequence[Mapping[str, Any]],
    options: Sequence[str],
    *,
    lead_in: bool = False,
) -> Choice:
    """Tokens of a conversation that ends with a question, and of the options as its answer.

    Args:
        recorder: The model; its tokenizer, template and longest row are used.
        messages: The conversation up to the question.
        options: The answers to choose from.
        lead_in: Whether tokens that all options begin with are given in the prompt. Templates of
            reasoning models open every answer with an empty thought, which is no choice.

    Returns:
        Tokens of the prompt, and of each option without its end of turn. Where a tokenizer merges
        the end of the prompt with some options, the prompt ends before that for all of them.

    Raises:
        UnscorableRow: reason `too_long` or `template_error`.
    """
    found = [
        response_span(
            recorder.engine.tokenizer,
            [*messages, {"role": "assistant", "content": option}],
            recorder.spec.template,
            max_length=recorder.engine.max_length,
        )
        for option in options
    ]
    start = min(span[0] for _, span in found)
    answers = [tokens[start : span[1] - 1] for tokens, span in found]
    if lead_in:
        # The last token of the shortest option stays: no option may be empty.
        columns = zip(*(answer[:-1] for answer in answers), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        start, answers = start + shared, [answer[shared:] for answer in answers]
    return found[0][0][:start], answers


def ask_choices(
    recorder: Recorder,
    scorer: str,
    version: int,
    bucket: int,
    asked: Mapping[str, tuple[Sequence[Mapping[str, Any]], Sequence[str]]],
    *,
    lead_in: bool = False,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Asks the questions of one store bucket.

    Args:
        recorder: The model.
        scorer: Name and version of the scorer, for the store.
        version: See `scorer`.
        bucket: Store bucket of all ids.
        asked: By id: the conversation up to the question, and the options.
        lead_in: See `choice_question`.

    Returns:
        Log-probabilities by id, in the order of the options; reasons by id of the others
        (`too_long`, `template_error`, `no_scores`, or what the engine says).
    """
    questions: dict[str, tuple[int, Choice]] = {}
    keys: dict[str, str] = {}
    failed: dict[str, str] = {}
    for identity, (messages, texts) in asked.items():
        try:
            prompt, options = choice_question(recorder, messages, texts, lead_in=lead_in)
        except UnscorableRow as error:
            failed[identity] = error.reason
            continue
        keys[identity] = score_key(prompt, options)
        length = len(prompt) + max(map(len, options))
        questions[keys[identity]] = (length, (prompt, options))

    def answer(batch: Sequence[Choice]) -> list[dict[str, Any] | str]:
        return _answers(recorder, batch)

    records, reasons = recorder.ask(scorer, version, {}, RECORD, bucket, questions, answer)
    found = dict(zip(records["key"].to_list(), records["logprobs"].to_list(), strict=True))
    failed |= {i: reasons[k] for i, k in keys.items() if k in reasons}
    return {i: found[k] for i, k in keys.items() if k in found}, failed


def _answers(recorder: Recorder, batch: Sequence[Choice]) -> list[dict[str, Any] | str]:
    """One record or reason a question."""
    # Options are the same tokens for every prompt but where they merge with it: group by them.
    out: list[dict[str, Any] | str] = [""] * len(batch)
    groups: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(batch):
        groups.setdefault(repr(options), []).append(i)
    for members in groups.values():
        prompts = [batch[i][0] for i in members]
        scores = recorder.engine.choices(prompts, batch[members[0]][1])
        for i, line in zip(members, scores, strict=True):
            known = {"logprobs": [float(x) for x in line]}
            out[i] = known if np.isfinite(line).all() else NO_SCORES
    return out


VERSION = 1
RUBRIC = (
    "Rate the response to the prompt below from {low} (worst) to {high} (best). A good response "
    "does what the prompt asks, is correct, complete and clear, and says nothing needless.\n\n"
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\n"
    "Reply with one number from {low} to {high} and nothing else."
)
"""The question put to the judge where the recipe gives none."""
_FIELD = re.compile(r"\{(prompt|response|low|high)\}")


@dataclass(frozen=True)
class Rubric:
    """A judge model with a rubric.

    Attributes:
        model: Name of a model of the recipe.
        rubric: Text of the question. {prompt} and {response} stand for the row's texts, {low} and
            {high} for the ends of the scale; other braces are left as they are.
        scale: Lowest and highest grade. One digit each: where a tokenizer splits numbers, the
            first token of 10 is that of 1.
    """

    model: str
    rubric: str = RUBRIC
    scale: tuple[int, int] = (1, 5)

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 <= self.scale[0] < self.scale[1] <= 9:
            raise ValueError(
                f"scale is {list(self.scale)}: give the lowest and the highest grade, 0 to 9"
            )
        if "{response}" not in self.rubric:
            raise ValueError("rubric has no {response}: say where the response goes")

    @property
    def grades(self) -> tuple[int, ...]:
        """The grades, rising."""
        return tuple(range(self.scale[0], self.scale[1] + 1))

    def question(self, prompt: str, response: str) -> str:
        """The rubric with a row's texts in their places; what these hold is not looked into."""
        low, high = self.scale
        texts = {"prompt": prompt, "response": response, "low": str(low), "high": str(high)}
        return _FIELD.sub(lambda match: texts[match[1]], self.rubric)


def expected_grade(logprobs: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    """Expected grade and total probability.

    Args:
        logprobs: Log-probability of each grade, finite, nats, shape (k,).
        grades: The grades, shape (k,).

    Returns:
        Sum of grade times probability, renormalised over the grades; and the sum of probabilities
        before that.
    """
    logprobs = np.asarray(logprobs, np.float64)
    weights = np.exp(logprobs - logprobs.max())
    mean = float(weights @ grades / weights.sum())
    # Rounding may leave the scale by a last bit.
    mean = min(max(mean, float(min(grades))), float(max(grades)))
    return mean, float(np.exp(logprobs).sum())


def score_rubric(
    config: Rubric, recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Grades the rows of one store bucket.

    Args:
        config: The rubric.
        recorder: The judge.
        bucket: Store bucket that all rows belong to.
        rows: Columns of `schema.ROW`. The judge reads all that the turns say, reasoning and tool
            calls included.

    Returns:
        Grade and mass by id, and reasons by id (`too_long`, `template_error`, `no_scores`).
    """
    options = tuple(map(str, config.grades))
    asked = {
        line["id"]: (
            [{"role": "user", "content": config.question(line["prompt"], line["response"])}],
            options,
        )
        for line in text_view(rows, everything=True).to_dicts()
    }
    # Rubric, grades and texts are all in the tokens, and these in the key.
    found, failed = ask_choices(recorder, "rubric", VERSION, bucket, asked, lead_in=True)
    grades = np.asarray(config.grades, np.float64)
    return {i: expected_grade(np.asarray(line), grades) for i, line in found.items()}, failed
