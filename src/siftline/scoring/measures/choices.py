"""Questions whose answer is one of a few given texts, read from log-probabilities.

A model that is asked to answer "A" or "B", or a number from 1 to 5, needs no generation: one
prefill gives the log-probability of every option. Options are scored without their end of turn,
because what counts is how the answer begins.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa

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
