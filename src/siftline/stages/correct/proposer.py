"""The models that propose corrections: trained on folds, found again by name."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from siftline.scoring.engines import ModelSpec
from siftline.shards import content_hash
from siftline.stages.correct.options import Correct
from siftline.training.finetune import TrainResult, finetune

TOLD = ("save_steps", "report_to")
"""Training options that decide no weight."""


def proposer_name(options: Correct, spec: ModelSpec, rows: pa.Table) -> str:
    """Folder name of the model that these rows make, by everything that decides its weights.

    Args:
        options: The stage's.
        spec: The base model.
        rows: Training rows, column id.
    """
    from siftline.scoring.fingerprint import directory_digest

    decisive = {k: v for k, v in vars(options.training).items() if k not in TOLD}
    base = directory_digest(Path(spec.path))
    ids = sorted(rows.column("id").to_pylist())
    return f"correct-{content_hash([base, spec.template, ids, decisive, options.seed])[:16]}"


def train_proposer(
    options: Correct,
    spec: ModelSpec,
    rows: pa.Table,
    folder: Path,
    dataset_version: str,
    progress: Callable[[int, int], None],
) -> TrainResult:
    """Fine-tunes the base model of `spec` on rows, or finds that it was done.

    Args:
        options: The stage's.
        spec: The base model, in a local directory.
        rows: Columns id, messages, tools, source.
        folder: Where the model goes; see `proposer_name`.
        dataset_version: For the model card.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: if the base is no local directory of its own weights; or see `finetune`.
    """
    if spec.engine == "server" or spec.adapter is not None:
        what = "runs at a server" if spec.engine == "server" else f"has adapter {spec.adapter!r}"
        raise ValueError(
            f"correct fine-tunes the target model, which {what}: name a local directory with the "
            "merged weights"
        )
    return finetune(
        Path(spec.path),
        rows.sort_by("id"),
        folder,
        options.training,
        seed=options.seed,
        dataset_version=dataset_version,
        template=spec.template,
        progress=progress,
    )
