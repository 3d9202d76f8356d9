"""Confidence in a row: consistency with the model's own samples, and the model's own verdict.

BSDetector (ACL 2024) as CLEAR uses it (arXiv 2403.12776). Consistency draws samples once per prompt
and holds every answer to that prompt against them; the share that agrees is the score. Reflection
asks the judge whether the proposed answer is correct and reads the verdict's log-probabilities, so
it costs one prefill and no generation. Whether reflection means anything for this model is measured
on the dev set, where the model's own draws can be checked: if the interval of its AUROC includes
0.5, reflection gets weight 0 and the stage says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from siftline.scoring.answers import answer_key, extract_answer
from siftline.scoring.choices import ask_choices
from siftline.scoring.engines import Sampling
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, prompt_tokens
from siftline.selectors.confidence import ConfidenceGate

VERSION = 1
REFLECTION = (
    "{prompt}\nProposed answer: {response}\nIs the proposed answer correct?\n(A) yes\n(B) no"
)
"""The question put to the judge; its reply is A or B."""
VERDICTS = ("A", "B")
VALUES = (1.0, 0.0)


@dataclass(frozen=True)
class Confidence:
    """The confidence stage.

    Attributes:
        samples: Draws per prompt (BSDetector k = 5).
        temperature: Of the draws (BSDetector 1.0).
        top_p: Of the draws.
        max_new_tokens: Of the draws.
        answers: "math" compares final answers, "exact" whole responses without case and space.
        reflection: "auto" weighs it by its AUROC on dev (0 or as set), "on" and "off" insist.
        weight_consistency: Share of consistency in the score (BSDetector beta = 0.7).
        threshold: "absolute" cuts at `cut`, "quantile" at that quantile, "median" drops about half
            whatever the data is like (CLEAR).
        cut: The threshold, or the quantile.
        seed: The recipe's seed.
    """

    samples: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    answers: Literal["math", "exact"] = "math"
    reflection: Literal["auto", "on", "off"] = "auto"
    weight_consistency: float = 0.7
    threshold: Literal["absolute", "quantile", "median"] = "median"
    cut: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: draw at least 1 per prompt")
        self.sampling  # noqa: B018  its own checks
        self.gate(self.weight_consistency)

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def gate(self, weight_consistency: float) -> ConfidenceGate:
        """The gate with the weight that calibration settled on."""
        return ConfidenceGate(
            threshold=self.threshold, cut=self.cut, weight_consistency=weight_consistency
        )


def final_answer(text: str, answers: Literal["math", "exact"]) -> str | None:
    """Key of a response's final answer; equal keys are equal answers, None is no answer."""
    if answers == "exact":
        return " ".join(text.lower().split()) or None
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
                max_length=recorder.spec.max_length,
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


def _reflection(messages: Sequence[Mapping[str, Any]], response: str) -> list[Mapping[str, Any]]:
    """The conversation with its last question turned into one about the proposed answer."""
    before = list(messages[:-1])
    last = before.pop() if before else {"role": "user", "content": ""}
    text = REFLECTION.format(prompt=last["content"], response=response)
    return [*before, {"role": "user", "content": text}]


def sampled_answers(draws: pl.DataFrame, answers: Literal["math", "exact"]) -> dict[str, list]:
    """Final answers of the draws by prompt id; a draw cut at its length has none."""
    found: dict[str, list[str | None]] = {}
    for line in draws.select("prompt_id", "text", "finish_reason").to_dicts():
        whole = line["finish_reason"] == "stop"
        key = final_answer(line["text"], answers) if whole else None
        found.setdefault(line["prompt_id"], []).append(key)
    return found
