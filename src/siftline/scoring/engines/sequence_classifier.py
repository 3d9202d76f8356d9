"""A sequence classification model: reward models, quality classifiers, regressors.

Two traps are closed at load. A model without a trained head gets a random one from transformers,
with nothing but a warning: here it is refused. And results may move with the padding: decoders find
the token they read from by looking for the padding token, which some models lack and others use as
their end of sequence. Rows are padded on the right with the model's own padding token; where it has
none, with a token that no row of the batch holds, so that the last real token is always the one
read. That padded and unpadded results agree is checked once at load.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from siftline import scoring as versions
from siftline.scoring.engines.base import ModelSpec, check_directory, check_rows
from siftline.scoring.engines.batching import in_halves
from siftline.scoring.engines.devices import torch_device
from siftline.scoring.engines.transformers_engine import check_tokens
from siftline.scoring.fingerprint import model_fingerprint
from siftline.scoring.templates import own_template

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of logits, as a share of the largest (1 at least), the check allows."""


class SequenceClassifier:
    """Classifies token sequences with a local transformers model.

    Attributes:
        spec: How the model is run.
        tokenizer: The model's tokenizer. Its `chat_template` is that of the spec, else its own,
            else None: a classifier without a template reads plain text.
        max_length: Most tokens of one row, special ones included.
        labels: Names of the outputs, in order.
        multi_label: Whether every output is a probability of its own (sigmoid), not a share of one
            distribution (softmax).
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Loads the model.

        Raises:
            ValueError: if the directory is missing or incomplete, an adapter is named, the model
                has no trained classification head, or padding changes its results.
        """
        if spec.adapter is not None:
            raise ValueError(f"adapter {spec.adapter!r} on a sequence classifier: merge it")
        if spec.engine != "transformers":
            raise ValueError(
                f"engine is {spec.engine!r} for {spec.path!r}: classifiers and reward models run "
                "on engine transformers"
            )
        self.spec = spec
        self.tokenizer = _load_tokenizer(spec)
        self.device = torch_device(spec.device)
        self._model: Any = _load(spec).to(self.device)
        config = self._model.config
        self.labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        self.multi_label = config.problem_type == "multi_label_classification"
        self.max_length = _longest(spec, self._model, self.tokenizer)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        pad = config.get_text_config().pad_token_id
        # Some configs of models without a padding token say -1.
        self._pad = pad if pad is not None and 0 <= pad < self._vocabulary else None
        self._fingerprint: str | None = None
        self._check()
        logger.info("sequence classifier on %s in %s: %s", self.device, spec.dtype, spec.path)

    def classify(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Raw outputs of the model, float32 (n, labels), in the order of the rows.

        Raises:
            ValueError: if a row is empty or longer than `max_length`, or the model does not know
                a token.
        """
        if self._model is None:
            raise ValueError(f"the classifier {self.spec.path!r} is closed: open a new one")
        check_rows(tokens, self.max_length)
        check_tokens(tokens, self._vocabulary)
        if not tokens:
            return np.zeros((0, len(self.labels)), np.float32)
        remedy = f"lower max_length (now {self.max_length}) or choose a smaller dtype"
        halved = in_halves(lambda part: list(self._forward(part)), tokens, self._shrink, remedy)
        return np.stack(halved)

    def fingerprint(self) -> str:
        """Hash of model files, dtype, template, torch's minor version and our version."""
        if self._fingerprint is None:
            release = ".".join(torch.__version__.split(".")[:2])
            self._fingerprint = model_fingerprint(
                self.spec,
                "sequence-classifier",
                f"torch {release}, classifier {versions.CLASSIFIER}",
            )
        return self._fingerprint

    def close(self) -> None:
        """Frees the model's memory."""
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        pad, longest = self._padding(rows), max(map(len, rows))
        ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        logits = self._model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
        ).logits
        assert logits.shape == (len(rows), len(self.labels)), tuple(logits.shape)
        return np.asarray(logits.float().cpu().numpy(), np.float32)

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The padding token of a batch; a model that has none is told it."""
        if self._pad is not None:
            return self._pad
        used = {token for row in rows for token in row}
        pad = next((token for token in range(self._vocabulary) if token not in used), None)
        if pad is None:
            raise ValueError(
                f"{self.spec.path!r} has no padding token and a batch uses its whole vocabulary: "
                "set pad_token_id in its config.json"
            )
        self._model.config.get_text_config().pad_token_id = pad
        return pad

    def _shrink(self, rows: int) -> None:
        logger.warning("out of memory with %d rows: running halves of them", rows)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _check(self) -> None:
        """Compares a padded row with the model's own answer to the row alone."""
        row = list(self.tokenizer("1 + 1 = 2, 2 + 2 = 4")["input_ids"])[: min(16, self.max_length)]
        if len(row) < 2:
            raise ValueError(f"the tokenizer of {self.spec.path!r} gives {row} for a short sum")
        short = row[: (len(row) + 1) // 2]
        alone = self._model(input_ids=torch.tensor([short], device=self.device)).logits
        theirs = alone[0].float().cpu().numpy()
        ours = self._forward([row, short])[1]
        worst = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
        if not worst <= TOLERANCE[self.spec.dtype]:
            raise ValueError(
                f"{self.spec.path!r} gives other results padded than alone (off by {worst:.3g}): "
                "check pad_token_id in its config.json"
            )


def _load_tokenizer(spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(check_directory(spec)),
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
    )
    # Unlike a causal model's, its rows may be plain text: without a template none is taken.
    tokenizer.chat_template = spec.template or own_template(tokenizer)
    return tokenizer


def _load(spec: ModelSpec) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(check_directory(spec)),
        dtype=getattr(torch, spec.dtype),
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{spec.path!r} has no trained weights for {', '.join(missing)}: name a model that was "
            "trained for sequence classification"
        )
    model.config.use_cache = False
    return model.eval()


def _longest(spec: ModelSpec, model: Any, tokenizer: Any) -> int:
    """Most tokens of a row: the least of what the recipe, the tokenizer and the model allow."""
    limits = [spec.max_length, tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind its padding token's.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    return int(min(limits))
