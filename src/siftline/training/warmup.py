"""A short adapter training whose states are kept: where gradient features are taken.

One snapshot for each pass over the rows, with what Adam knew at that point: the adapter's weights,
both moments, the steps taken. It is the trainer of `finetune` on the same planned passes, so a
killed warm-up goes on from its last checkpoint and, on one CPU, ends in the same bytes.

The folder holds step-N.safetensors for each snapshot, warmup.json (written last) and, while
training, checkpoints/.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from siftline.rows.schema import digest
from siftline.rows.verified import (
    AlteredError,
    UnhashedError,
    confirm,
    file_hash,
    read_hashed,
    with_hash,
)
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.fingerprint import RETRAIN, model_digest
from siftline.scoring.templates import load_tokenizer
from siftline.selectors.less import Gradients
from siftline.training.finetune import write_json
from siftline.training.material import Passes, lay_out, training_passes
from siftline.training.objectives import Objective
from siftline.training.sft import FineTune, last_checkpoint, load_model, sft_arguments
from siftline.training.trainer import PlannedTrainer

FACTS = "warmup.json"
MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}
"""What a snapshot calls the moments of Adam, and what torch does."""


@dataclass(frozen=True)
class Snapshot:
    """The adapter after one pass of a warm-up.

    Attributes:
        path: The safetensors file; see `read_snapshot`.
        step: Optimizer steps taken.
        weight: Share of this pass in the learning rates of all; they sum to 1.
    """

    path: Path
    step: int
    weight: float


def adapter_options(asked: Gradients, max_length: int) -> FineTune:
    """The adapter and how it is warmed up."""
    return FineTune(
        method="lora",
        lora_rank=asked.rank,
        learning_rate=asked.learning_rate,
        epochs=float(asked.epochs),
        batch_rows=asked.batch_rows,
        max_length=max_length,
        schedule="linear",
        save_steps=100,
    )


def read_snapshot(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Tensors of a snapshot by the name of their parameter.

    Args:
        path: Its file.
        kind: "weight", "mean" or "square".
    """
    with safe_open(str(path), "pt") as stored:
        return {
            name.partition("/")[2]: stored.get_tensor(name)
            for name in stored.keys()  # noqa: SIM118  it is no mapping
            if name.startswith(f"{kind}/")
        }


def warm_up(
    spec: ModelSpec,
    rows: pa.Table,
    out: Path,
    asked: Gradients,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Snapshot]:
    """Trains an adapter on rows and keeps its state after every pass.

    Started again on the same `out`, it goes on, or finds what a finished one left.

    Args:
        spec: The model to start from, its template and longest row.
        rows: Columns `id` and `messages` (and `tools`).
        out: Folder of the snapshots.
        asked: Passes, rank, rates.
        seed: Of the order of rows and the adapter's first weights.
        progress: Called with (steps done, steps in all).

    Raises:
        ValueError: if no row can be trained on, or `out` holds another warm-up.
    """
    config = adapter_options(asked, spec.max_length)
    tokenizer = load_tokenizer(spec)
    rows = rows.sort_by("id")
    passes = _planned(rows, tokenizer, config, asked.epochs, seed)
    run = digest(model_digest(spec), asdict(config), spec.template, seed, rows["id"].to_pylist())
    facts = _recorded(out, run)
    if facts is None:
        facts = _train(spec, tokenizer, passes, out, config, asked.epochs, seed, run, progress)
    return [Snapshot(out / name, step, share) for name, step, share in facts["snapshots"]]


def _planned(rows: pa.Table, tokenizer: Any, config: FineTune, epochs: int, seed: int) -> Passes:
    """Every pass over the rows in as many steps as the others, so that snapshots fall between."""
    one = lay_out(tokenizer, rows, replace(config, epochs=1.0), seed, 1)
    tokens = int(one.tokens_by_step().sum())
    whole = replace(config, loss_tokens=tokens * epochs, steps=one.steps * epochs)
    return training_passes(
        lay_out(tokenizer, rows, whole, seed, 1), rows, tokenizer, config, seed, None
    )


def _recorded(out: Path, run: str) -> dict[str, Any] | None:
    path = out / FACTS
    if not path.exists():
        return None
    try:
        facts = read_hashed(path, "the record of a warm-up", RETRAIN)
    except UnhashedError:  # of an earlier version of Siftline: it is made again
        return None
    if facts["run"] != run:
        raise ValueError(f"{str(out)!r} holds a warm-up of something else: name a new folder")
    for name, sha256 in facts["files"].items():
        confirm(out / name, sha256, RETRAIN)
    return facts


def _train(
    spec: ModelSpec,
    tokenizer: Any,
    passes: Passes,
    out: Path,
    config: FineTune,
    epochs: int,
    seed: int,
    run: str,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    steps = passes.schedule.steps
    marks = [steps * (epoch + 1) // epochs for epoch in range(epochs)]
    checkpoints = out / "checkpoints"
    begun = checkpoints / "run.json"
    if begun.exists() and _begun(begun) != run:
        shutil.rmtree(checkpoints)  # of another warm-up, which was never finished
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(begun, {"run": run})
    trainer = PlannedTrainer(
        model=load_model(Path(spec.path).expanduser(), config, seed),
        arguments=sft_arguments(config, checkpoints, seed),
        tokenizer=tokenizer,
        passes=passes,
        objective=Objective(),
        packing=config.packing,
        dev=None,
        keep_best=False,
        progress=progress,
    )
    trainer.add_callback(_Keep(out, marks))
    checkpoint = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    means = np.array([np.mean(rates[a:b]) for a, b in zip([0, *marks], marks, strict=False)])
    # One step that is all warm-up has rate 0, as has every pass then.
    shares = means / means.sum() if means.any() else np.full(epochs, 1 / epochs)
    snapshots = [[_file(m), m, float(s)] for m, s in zip(marks, shares, strict=True)]
    facts = {
        "run": run,
        "snapshots": snapshots,
        "files": {_file(mark): file_hash(out / _file(mark)) for mark in marks},
        "rows": len(passes.schedule.rows.ids),
        "skipped": passes.schedule.rows.skipped.height,
        "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }
    write_json(out / FACTS, with_hash(facts))
    shutil.rmtree(checkpoints)
    return facts


def _begun(path: Path) -> str:
    """The warm-up that checkpoints are of."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise AlteredError(f"{path} is not the record of a warm-up ({error}): {RETRAIN}") from error


def _file(step: int) -> str:
    return f"step-{step:06d}.safetensors"


class _Keep(TrainerCallback):
    """Writes a snapshot at given steps, and has the trainer save there too."""

    def __init__(self, out: Path, marks: Iterable[int]) -> None:
        self.out, self.marks = out, frozenset(marks)

    def on_step_end(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        if state.global_step not in self.marks:
            return
        model, optimizer = at["model"], at["optimizer"]
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensors[f"weight/{name}"] = parameter
                for short, own in MOMENTS.items():
                    tensors[f"{short}/{name}"] = optimizer.state[parameter][own]
        path = self.out / _file(state.global_step)
        whole = {name: part.detach().float().cpu().contiguous() for name, part in tensors.items()}
        draft = path.with_name(f".{path.name}")
        save_file(whole, str(draft))
        draft.replace(path)
        control.should_save = True
