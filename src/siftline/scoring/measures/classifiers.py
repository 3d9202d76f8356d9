"""Scores from sequence classification models: rewards, class probabilities, regressed values.

The raw outputs are recorded, by the tokens they belong to. Which label is asked for, and how it
becomes a number, is arithmetic on them, so another label asks the model nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from siftline.rows.schema import text_view
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.recorder import Recorder
from siftline.scoring.spans import UnscorableRow, encode, rendered, response_span
from siftline.store.store import score_key

if TYPE_CHECKING:
    from siftline.scoring.engines.sequence_classifier import SequenceClassifier

VERSION = 1
RECORD = pa.schema([("key", pa.string()), ("logits", pa.list_(pa.float32()))])
Over = Literal["response", "conversation", "prompt"]
OVER: tuple[Over, ...] = ("response", "conversation", "prompt")


@dataclass(frozen=True)
class Reward:
    """A reward model: sequence classification with one output, whose raw logit is the score.

    It reads the whole conversation under its own chat template. A row of plain text is read as the
    likelihood scorer reads it: start token, text, end of sequence.

    Attributes:
        model: Name of a model of the recipe.
    """

    model: str


@dataclass(frozen=True)
class Classifier:
    """A text classifier.

    One output is a regressed value, taken as it is (FineWeb-Edu, arXiv 2406.17557). Of several, the
    score is the probability of one label, or the expected value over labels that are numbers, as
    DEITA's scorers have it (arXiv 2312.15685). DEITA's own models are causal: for these use
    kind rubric with a scale from 1 to 6.

    Attributes:
        model: Name of a model of the recipe.
        label: Whose probability to take, by the name in the model's `id2label`.
        expected: Take the expected value instead; every label's name must hold one number.
        over: What is read: the last turn's text, the text of what is before it, or the whole
            conversation (under the model's chat template if it has one, else as plain text).
    """

    model: str
    label: str | None = None
    expected: bool = False
    over: Over = "response"

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ValueError(f"over is {self.over!r}: choose one of {', '.join(OVER)}")
        if self.expected and self.label is not None:
            raise ValueError(
                f"label is {self.label!r} and expected is true: ask for one of the two"
            )


def open_classifier(spec: ModelSpec) -> "SequenceClassifier":
    """Loads the classifier or reward model of `spec`.

    Raises:
        ValueError: if the directory is missing or holds no trained sequence classifier.
    """
    from siftline.scoring.engines.sequence_classifier import SequenceClassifier

    return SequenceClassifier(spec)


def score_rewards(
    config: Reward, recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, float], dict[str, str]]:
    """Rewards of the rows of one store bucket.

    Args:
        config: Which model.
        recorder: That model, as `open_classifier` gives it.
        bucket: Store bucket that all rows belong to.
        rows: Columns id, messages, tools.

    Returns:
        Raw logits by id, and reasons by id (`too_long`, `template_error`, `not_finite`).

    Raises:
        ValueError: if the model has several outputs or no chat template.
    """
    classifier = recorder.engine
    if len(classifier.labels) != 1:
        raise ValueError(
            f"model {config.model!r} has outputs {_listed(classifier.labels)}, a reward model has "
            "one: use kind classifier"
        )
    if not classifier.tokenizer.chat_template:
        raise ValueError(
            f"model {config.model!r} has no chat template: set template to the one it was "
            "trained with"
        )
    tokens: dict[str, list[int]] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        try:
            tokens[row["id"]] = _conversation(classifier.tokenizer, row)
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
    logits, lacking = ask_logits(recorder, bucket, tokens)
    return {i: float(line[0]) for i, line in logits.items()}, failed | lacking


def score_classes(
    config: Classifier, recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, float], dict[str, str]]:
    """Classifier scores of the rows of one store bucket.

    Args:
        config: Which model, and which number of its outputs.
        recorder: That model, as `open_classifier` gives it.
        bucket: Store bucket that all rows belong to.
        rows: Columns of `schema.ROW`.

    Returns:
        Values by id, and reasons by id (`too_long`, `template_error`, `not_finite`, and `no_text`
        where there is nothing to read).

    Raises:
        ValueError: if the label is unknown, none is named where there are several, or the labels
            have no expected value.
    """
    weigh = _weigher(config, recorder.engine)
    tokenizer = recorder.engine.tokenizer
    templated = config.over == "conversation" and bool(tokenizer.chat_template)
    texts = _texts(rows, config.over)
    tokens: dict[str, list[int]] = {}
    failed: dict[str, str] = {}
    for row in rows.select(["id", "messages", "tools"]).to_pylist():
        text = texts[row["id"]]
        if not text.strip():
            failed[row["id"]] = "no_text"
            continue
        try:
            read = _conversation(tokenizer, row) if templated else _plain(tokenizer, text)
            tokens[row["id"]] = read
        except UnscorableRow as error:
            failed[row["id"]] = error.reason
    logits, lacking = ask_logits(recorder, bucket, tokens)
    return {i: weigh(line) for i, line in logits.items()}, failed | lacking


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels))


def _weigher(
    config: Classifier, classifier: "SequenceClassifier"
) -> Callable[[Sequence[float]], float]:
    """How the raw outputs become the score."""
    labels = classifier.labels
    if len(labels) == 1:
        if config.label is not None or config.expected:
            raise ValueError(
                f"model {config.model!r} has one output, which is the score: leave out label and "
                "expected"
            )
        return lambda logits: float(logits[0])
    if config.expected:
        if classifier.multi_label:
            raise ValueError(
                f"labels {_listed(labels)} of model {config.model!r} are independent: there is no "
                "expected value, name a label"
            )
        values = _ordinals(labels)
        return lambda logits: float(softmax(logits) @ values)
    if config.label is None:
        raise ValueError(f"model {config.model!r} has labels {_listed(labels)}: set label to one")
    if labels.count(config.label) != 1:
        raise ValueError(
            f"model {config.model!r} has no single label {config.label!r}: choose one of "
            f"{_listed(labels)}"
        )
    at = labels.index(config.label)
    if classifier.multi_label:
        return lambda logits: float(0.5 * (1 + np.tanh(0.5 * logits[at])))  # sigmoid, no overflow
    return lambda logits: float(softmax(logits)[at])


def softmax(logits: Sequence[float]) -> np.ndarray:
    """Probabilities, float64 (n,), of finite logits (n,)."""
    shifted = np.exp(np.asarray(logits, np.float64) - max(logits))
    return np.asarray(shifted / shifted.sum())


def _ordinals(labels: Sequence[str]) -> np.ndarray:
    """The number in each label's name, float64: 4 of "4", "LABEL_4" or "4 stars"."""
    numbers = [re.findall(r"\d+(?:\.\d+)?", label) for label in labels]
    values = [float(found[0]) for found in numbers if len(found) == 1]
    if len(set(values)) != len(labels):
        raise ValueError(
            f"expected needs labels with one number each, all different: these are "
            f"{_listed(labels)}"
        )
    return np.asarray(values)


def _texts(rows: pa.Table, over: Over) -> dict[str, str]:
    """What is read of each row as plain text, by id; reasoning and tool calls included."""
    texts = {}
    for line in text_view(rows, everything=True).to_dicts():
        parts = {
            "response": [line["response"]],
            "prompt": [line["prompt"]],
            "conversation": [line["prompt"], line["response"]],
        }
        texts[line["id"]] = "\n".join(part for part in parts[over] if part)
    return texts


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with the special tokens the tokenizer puts around it."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _conversation(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Tokens of a templated conversation, whole; those of a plain text without the template."""
    messages, tools = row["messages"], row["tools"]
    if len(messages) > 1 or tools:
        return encode(tokenizer, rendered(tokenizer, messages, tools=tools))
    if tokenizer.eos_token_id is None:  # an encoder's tokenizer frames the text by itself
        return _plain(tokenizer, messages[0]["content"] or "")
    return response_span(tokenizer, messages)[0]


def ask_logits(
    recorder: Recorder, bucket: int, tokens: Mapping[str, list[int]]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Raw outputs of a classifier for the rows of one store bucket, and reasons, by id."""
    classifier = recorder.engine
    keys: dict[str, str] = {}
    failed: dict[str, str] = {}
    questions: dict[str, tuple[int, list[int]]] = {}
    for identity, row in tokens.items():
        if not 1 <= len(row) <= classifier.max_length:
            failed[identity] = "too_long" if row else "no_text"
            continue
        keys[identity] = score_key(row)
        questions[keys[identity]] = (len(row), row)

    def answer(batch: Sequence[list[int]]) -> list[dict[str, Any] | str]:
        found = classifier.classify(batch)
        return [
            {"logits": [float(x) for x in line]} if np.isfinite(line).all() else "not_finite"
            for line in found
        ]

    records, reasons = recorder.ask("logits", VERSION, {}, RECORD, bucket, questions, answer)
    known = dict(zip(records["key"].to_list(), records["logits"].to_list(), strict=True))
    failed |= {i: reasons[k] for i, k in keys.items() if k in reasons}
    return {i: known[k] for i, k in keys.items() if k in known}, failed
