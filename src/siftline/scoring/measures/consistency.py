"""How alike a response and a model's own samples are, by words, by vectors, or by entailment.

BSDetector (arXiv 2308.16175) holds an answer against samples with a natural-language-inference
model; cleanlab/tlm offers word overlap and embeddings beside it. Samples are drawn once per prompt
and shared by all its responses, so pairs come by response: its text, and the samples' texts. Equal
texts are asked once, and every answer is a recorded fact.

Confidence in a row: consistency with the model's own samples, and the model's own verdict.
"""

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.kernels.text.normalization import normalized
from siftline.rows.schema import digest
from siftline.scoring.measures.classifiers import ask_logits, softmax
from siftline.scoring.measures.embed import embed_texts
from siftline.scoring.measures.judge import ask_choices
from siftline.scoring.recorder import Recorder, unanswered
from siftline.scoring.spans import UnscorableRow, prompt_tokens

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Held:
    """A response and what it is held against.

    Attributes:
        prompt: Text before the response.
        own: The response.
        samples: Samples of the same prompt.
    """

    prompt: str
    own: str
    samples: Sequence[str]


def word_overlap(left: str, right: str) -> float:
    """Jaccard similarity of the sets of words, case aside; 1 where neither has any."""
    a, b = _words(left), _words(right)
    return len(a & b) / len(a | b) if a | b else 1.0


def _words(text: str) -> set[str]:
    return set(_WORD.findall(normalized("NFKC", text).casefold()))


def overlaps(held: Mapping[str, Held]) -> dict[str, float]:
    """Mean word overlap with the samples, by id; rows without samples are left out."""
    return {
        i: float(np.mean([word_overlap(one.own, text) for text in one.samples]))
        for i, one in held.items()
        if one.samples
    }


Similar = tuple[dict[str, float], dict[str, str]]
"""Values by id, and reasons by id of rows with samples that have no value."""


def cosines(recorder: Recorder, bucket: int, held: Mapping[str, Held]) -> Similar:
    """Mean cosine with the samples, each clipped to [0, 1] (cleanlab/tlm).

    Args:
        recorder: The embedder.
        bucket: Store bucket of all ids.
        held: By id.

    Returns:
        Means by id, and reasons by id of rows with a text that got no vector; rows without samples
        are in neither.
    """
    asked = {i: (one.own, *one.samples) for i, one in held.items() if one.samples}
    texts = {text: text for needed in asked.values() for text in needed}
    vectors, reasons = embed_texts(recorder, bucket, texts)
    found, lost = {}, {}
    for i, needed in asked.items():
        if all(text in vectors for text in needed):
            own, *others = (_unit(vectors[text]) for text in needed)
            found[i] = float(np.clip([own @ other for other in others], 0.0, 1.0).mean())
        else:
            lost[i] = _why(needed, vectors, reasons)
    return found, lost


def _why(needed: Sequence[str], known: Container[str], reasons: Mapping[str, str]) -> str:
    """Of the reasons of what is missing the first that another try may end, else the first."""
    given = sorted(reasons[name] for name in needed if name not in known)
    return next((reason for reason in given if unanswered([reason])), given[0])


def _unit(vector: np.ndarray) -> np.ndarray:
    """Unit length in float64: recorded vectors are float16."""
    wide = vector.astype(np.float64)
    return np.asarray(wide / max(float(np.linalg.norm(wide)), 1e-12))


def agreements(recorder: Recorder, bucket: int, held: Mapping[str, Held]) -> Similar:
    """Mean of 1 - (p_contra(y, y_i) + p_contra(y_i, y)) / 2 over the samples (BSDetector).

    Both texts of a pair carry the prompt before them, and both orders are asked.

    Args:
        recorder: An NLI cross-encoder, as `classifiers.open_classifier` gives it.
        bucket: Store bucket of all ids.
        held: By id.

    Returns:
        Means by id, and reasons by id of rows with a pair that has no answer (one that is
        `too_long`, say); rows without samples are in neither.

    Raises:
        ValueError: if the model is no NLI cross-encoder that this can ask.
    """
    at = _contradiction(recorder)
    pairs: dict[str, tuple[str, str]] = {}
    for one in held.values():
        own = _with_prompt(one.prompt, one.own)
        for text in one.samples:
            other = _with_prompt(one.prompt, text)
            pairs |= {_name(own, other): (own, other), _name(other, own): (other, own)}
    tokenizer = recorder.engine.tokenizer
    tokens = {
        name: list(tokenizer(first, second, verbose=False)["input_ids"])
        for name, (first, second) in pairs.items()
    }
    logits, reasons = ask_logits(recorder, bucket, tokens)
    against = {name: float(softmax(line)[at]) for name, line in logits.items()}
    found, lost = {}, {}
    for i, one in held.items():
        own = _with_prompt(one.prompt, one.own)
        others = [_with_prompt(one.prompt, text) for text in one.samples]
        names = [(_name(own, other), _name(other, own)) for other in others]
        if all(name in against for both in names for name in both):
            shares = [1.0 - 0.5 * (against[a] + against[b]) for a, b in names]
            if shares:
                found[i] = float(np.mean(shares))
        else:
            lost[i] = _why([name for both in names for name in both], against, reasons)
    return found, lost


def _with_prompt(prompt: str, text: str) -> str:
    return f"{prompt}\n{text}" if prompt else text


def _name(first: str, second: str) -> str:
    return digest(first, second)


def _contradiction(recorder: Recorder) -> int:
    """Which output is the probability of a contradiction."""
    classifier, path = recorder.engine, recorder.spec.path
    marks = ("contradiction", "contradictory")
    found = [i for i, label in enumerate(classifier.labels) if label.casefold() in marks]
    if len(found) != 1 or classifier.multi_label:
        raise ValueError(
            f"model {path!r} has labels {', '.join(map(repr, classifier.labels))}: the nli part "
            "needs a model with one label 'contradiction'"
        )
    config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    # BERT and ELECTRA tell the two texts apart by segment ids, which the classifier is not given.
    if config.get("type_vocab_size", 0) > 1:
        raise ValueError(
            f"model {path!r} tells its two texts apart by segment ids, which are not passed on: "
            "take a RoBERTa, DeBERTa or ModernBERT cross-encoder"
        )
    return found[0]


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
    from siftline.scoring.answers.find import extract_answer
    from siftline.scoring.answers.quantities import answer_key

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
