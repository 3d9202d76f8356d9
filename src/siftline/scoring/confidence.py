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
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.scoring.choices import ask_choices
from siftline.scoring.engines import Sampling
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, prompt_tokens
from siftline.selectors.confidence import BSDETECTOR, ConfidenceGate, reflection_from_choices

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


@dataclass(frozen=True)
class Confidence:
    """The confidence stage.

    Attributes:
        samples: Draws per prompt (BSDetector k = 5).
        temperature: Temperature of the draws (BSDetector 1.0).
        top_p: Draws come from the smallest set of tokens that holds this probability.
        max_new_tokens: Most tokens of a draw.
        answers: "math" compares final answers, "exact" whole responses without case and space.
        reflection: "auto" weighs it by its AUROC on dev (0 or as set), "on" and "off" insist.
        questions: Questions of reflection: 1 asks whether the answer is right; 2 asks again after
            the judge's own reply, and takes the mean (BSDetector asks twice).
        weight_consistency: Share of consistency in the score (BSDetector beta = 0.7), the rest
            being reflection's; not used where `weights` are given.
        weights: Weight by part, in any unit. Parts are agreement, jaccard, embedding, nli,
            reflection and perplexity. TLM's default is about 0.33 consistency, 0.47 reflection,
            0.20 perplexity.
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
    questions: Literal[1, 2] = 1
    weight_consistency: float = BSDETECTOR["agreement"]
    weights: dict[str, float] = field(default_factory=dict)
    threshold: Literal["absolute", "quantile", "median"] = "median"
    cut: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: draw at least 1 per prompt")
        if self.questions not in (1, 2):
            raise ValueError(f"questions is {self.questions}: ask 1 or 2")
        if not 0 <= self.weight_consistency <= 1:
            raise ValueError(
                f"weight_consistency is {self.weight_consistency}: give a number from 0 to 1"
            )
        self.sampling  # noqa: B018  its own checks
        self.gate(self.weighing)

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def weighing(self) -> dict[str, float]:
        """Weight by part, as far as the options alone settle it."""
        share = self.weight_consistency
        found = dict(self.weights) or {"agreement": share, "reflection": 1.0 - share}
        return without_reflection(found) if self.reflection == "off" else found

    @property
    def more_roles(self) -> tuple[str, ...]:
        """Roles of the models it asks besides sampler and judge."""
        roles = {"embedding": "embedder", "nli": "nli"}
        return tuple(role for part, role in roles.items() if self.weighing.get(part, 0.0) > 0)

    def check_after(self, kinds: Sequence[str], where: str) -> None:
        """Refuses a weight for what no stage before this one gives.

        Args:
            kinds: Of the stages before it.
            where: Its place in the recipe.

        Raises:
            ValueError: if perplexity has a weight and no likelihood stage comes before.
        """
        if self.weighing.get("perplexity", 0.0) > 0 and "likelihood" not in kinds:
            raise ValueError(
                f"{where}: weights name perplexity, which the likelihood stage gives: put "
                "likelihood before it"
            )

    def gate(self, weights: Mapping[str, float]) -> ConfidenceGate:
        """The gate with the weights that calibration settled on."""
        return ConfidenceGate(threshold=self.threshold, cut=self.cut, weights=dict(weights))


def without_reflection(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of the other parts, scaled to sum to 1; agreement's where all were reflection's.

    Raises:
        ValueError: if reflection is the only part there is.
    """
    left = {part: weight for part, weight in weights.items() if part != "reflection"}
    total = sum(left.values())
    if not total and "agreement" not in left:
        raise ValueError(
            "weights: reflection is the only part, and gets no weight here: add another, say "
            "agreement"
        )
    if not total:
        return {**left, "agreement": 1.0}
    return {part: weight / total for part, weight in left.items()}


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
