"""Confidence in a row: consistency with the model's own samples, and the model's own verdict.

BSDetector (ACL 2024, arXiv 2308.16175) as CLEAR uses it (arXiv 2403.12776), with the further parts
of cleanlab/tlm. Consistency draws samples once per prompt and holds every answer to that prompt
against them; the share that agrees is the score, or a similarity of texts (see `similarity`).
Reflection asks the judge whether the proposed answer is correct and reads the verdict's
log-probabilities, so it costs one prefill and no generation. Whether reflection means anything for
this model is measured on the dev set, where the model's own draws can be checked: if the interval
of its AUROC includes 0.5, reflection gets weight 0 and the stage says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.scoring.choices import ask_choices
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, prompt_tokens

VERSION = 1
REFLECTION = (
    "{prompt}\nProposed answer: {response}\nIs the proposed answer correct?\n(A) yes\n(B) no"
)
"""The question put to the judge; its reply is A or B."""
VERDICTS = ("A", "B")
VALUES = (1.0, 0.0)
AGAIN = (
    "Are you really sure that the proposed answer is correct? Choose again.\n"
    "(A) correct\n(B) incorrect\n(C) not sure"
)
"""The second question, put after the judge's own likeliest reply to the first."""
SECOND_VERDICTS = ("A", "B", "C")
SECOND_VALUES = (1.0, 0.0, 0.5)
SAMPLED = ("agreement", "jaccard", "embedding", "nli")
"""Parts that hold a response against samples."""


def final_answer(text: str, answers: Literal["math", "exact"]) -> str | None:
    """Key of a response's final answer; equal keys are equal answers, None is no answer."""
    if answers == "exact":
        return " ".join(text.lower().split()) or None
    from siftline.scoring.answers import extract_answer
    from siftline.scoring.quantities import answer_key

    found = extract_answer(text)
    return answer_key(found) if found is not None else None


def prompts_of(recorder: Recorder, rows: pa.Table) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Token ids to answer from, by prompt id, and reasons by prompt id of those that don't fit."""
    tokens: dict[str, list[int]] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["prompt_id", "messages", "tools"]).to_pylist():
        prompt = row["prompt_id"]
        if prompt in tokens or prompt in failed:
            continue
        try:
            tokens[prompt] = prompt_tokens(
                recorder.engine.tokenizer,
                row["messages"],
                recorder.spec.template,
                tools=row["tools"],
                max_length=recorder.engine.max_length,
            )
        except UnscorableRow as error:
            failed[prompt] = error.reason
    return tokens, failed


def reflect(
    recorder: Recorder, bucket: int, asked: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Asks the judge about proposed answers of one store bucket.

    Args:
        recorder: The judge.
        bucket: Store bucket of all ids.
        asked: By id: the conversation (its last message is ignored) and the proposed answer.

    Returns:
        Log-probabilities of the verdicts by id, in the order of `VERDICTS`; reasons by id.
    """
    questions = {i: (_reflection(*question), VERDICTS) for i, question in asked.items()}
    return ask_choices(recorder, "verdict", VERSION, bucket, questions)


def reflections(
    recorder: Recorder,
    bucket: int,
    asked: Mapping[str, tuple[Sequence[Mapping[str, Any]], str]],
    questions: int = 1,
) -> tuple[dict[str, float], dict[str, str]]:
    """Reflection as a number: the expected value of the verdicts.

    Args:
        recorder: See `reflect`.
        bucket: See `reflect`.
        asked: See `reflect`.
        questions: 2 asks again in a second turn, after the likeliest of the first replies, and
            takes the mean of both.

    Returns:
        Values in [0, 1] by id, and reasons by id of the others.
    """
    first, failed = reflect(recorder, bucket, asked)
    values = _expected(first, VALUES)
    if questions == 1:
        return values, failed
    again = {}
    for i, logprobs in first.items():
        said = VERDICTS[int(np.argmax(logprobs))]
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": AGAIN}]
        again[i] = ([*_reflection(*asked[i]), *turns], SECOND_VERDICTS)
    second, lost = ask_choices(recorder, "second_verdict", VERSION, bucket, again)
    more = _expected(second, SECOND_VALUES)
    return {i: 0.5 * (values[i] + more[i]) for i in more}, failed | lost


def _expected(logprobs: Mapping[str, Sequence[float]], values: Sequence[float]) -> dict[str, float]:
    if not logprobs:
        return {}
    found = reflection_from_choices(np.array(list(logprobs.values())), values)
    return {i: float(v) for i, v in zip(logprobs, found, strict=True)}


def about_answers(
    messages: Sequence[Mapping[str, Any]], question: str, **answers: str
) -> list[Mapping[str, Any]]:
    """The conversation with its last question turned into one about answers to it.

    Args:
        messages: The conversation; its last message is ignored.
        question: Text with a field for `prompt` and for each of the answers.
        answers: Texts by field; what these hold is not looked into.
    """
    before = list(messages[:-1])
    last = before.pop() if before else {"role": "user", "content": ""}
    text = question.format(prompt=last["content"], **answers)
    return [*before, {"role": "user", "content": text}]


def _reflection(messages: Sequence[Mapping[str, Any]], response: str) -> list[Mapping[str, Any]]:
    return about_answers(messages, REFLECTION, response=response)


def sampled_answers(draws: pl.DataFrame, answers: Literal["math", "exact"]) -> dict[str, list]:
    """Final answers of the draws by prompt id; a draw cut at its length has none."""
    found: dict[str, list[str | None]] = {}
    for line in draws.select("prompt_id", "text", "finish_reason").to_dicts():
        whole = line["finish_reason"] == "stop"
        key = final_answer(line["text"], answers) if whole else None
        found.setdefault(line["prompt_id"], []).append(key)
    return found


def reflection_from_choices(logprobs: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """Expected value of the model's verdict, from the log-probabilities of its choices.

    Args:
        logprobs: Log-probability of each choice, shape (n, c).
        values: What a choice is worth; BSDetector: correct 1, incorrect 0, not sure 0.5.

    Returns:
        float64 expectation under the softmax over the choices, shape (n,).

    Raises:
        ValueError: if the number of values is not the number of choices.
    """
    if logprobs.ndim != 2 or logprobs.shape[1] != len(values):
        raise ValueError(f"{logprobs.shape} choices and {len(values)} values: give one per choice")
    scores = logprobs.astype(np.float64)
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds @ np.asarray(values, dtype=np.float64) / odds.sum(axis=1)
