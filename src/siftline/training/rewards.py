"""Rewards for reinforcement learning on the `rlvr` config of a curated version."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from siftline.scoring.verifiers import Verifier, get_verifier


@cache
def _named(name: str) -> Verifier:
    return get_verifier(name)


def verified(
    completions: Sequence[Any], answer: Sequence[str], verifier: Sequence[str], **columns: Any
) -> list[float]:
    """A reward function for TRL's GRPOTrainer: 1 for a verified completion, 0 for any other.

    The columns `answer` and `verifier` of the config come to it by name.

    Args:
        completions: Strings, or conversations whose last message is the answer, shape (n,).
        answer: Reference answers, shape (n,).
        verifier: Names of verifiers, shape (n,).
        columns: The dataset's other columns; not used.

    Returns:
        Rewards, shape (n,).
    """
    texts = [c if isinstance(c, str) else (c[-1]["content"] or "") for c in completions]
    judged = zip(texts, answer, verifier, strict=True)
    return [float(_named(name)(text, wanted).correct is True) for text, wanted, name in judged]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **options: Any
) -> float:
    """A reward function for verl, over the columns that `siftline export --to verl` writes.

    Args:
        data_source: Not used.
        solution_str: The completion.
        ground_truth: The reference answer.
        extra_info: Holds the name of the verifier.
        options: What verl passes beside; not used.

    Returns:
        1 for a verified completion, else 0.
    """
    return verified([solution_str], [ground_truth], [extra_info["verifier"]])[0]


def axolotl_prompts(cfg: Any, *given: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Rows of an exported rlvr.jsonl for axolotl's GRPO: prompt, and what `verified` reads."""

    def row(example: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
        return {name: example[name] for name in ("prompt", "answer", "verifier")}

    return row, {"remove_columns": ["id"]}
