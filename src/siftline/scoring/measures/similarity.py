"""How alike a response and a model's own samples are, by words, by vectors, or by entailment.

BSDetector (arXiv 2308.16175) holds an answer against samples with a natural-language-inference
model; cleanlab/tlm offers word overlap and embeddings beside it. Samples are drawn once per prompt
and shared by all its responses, so pairs come by response: its text, and the samples' texts. Equal
texts are asked once, and every answer is a recorded fact.
"""

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from siftline.kernels.text.normalization import normalized
from siftline.rows.schema import digest
from siftline.scoring.measures.classifiers import ask_logits, softmax
from siftline.scoring.measures.embedding import embed_texts
from siftline.scoring.reasons import unanswered
from siftline.scoring.recorder import Recorder

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
