"""Fine-tuning on a curated version, with TRL's SFTTrainer.

Rows come templated with the spans that scoring uses, too long ones are reported instead of cut, and
the rows of every optimizer step are planned before training (see `schedule`). So two arms of a
comparison take the same number of steps over the same loss tokens, and a resumed run sees the
batches the killed one would have seen.

The model directory holds config.json, model.safetensors, the tokenizer with its chat template,
README.md (model card), curve.csv, curve.png, skipped.csv, training.json (written last) and, while
training, checkpoints/. With LoRA the adapter is in adapter/ and the weights are the merged ones, so
every engine loads the directory as it is.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.schema import digest
from siftline.selectors.selection import DECISION
from siftline.training.budget import tokenize_rows
from siftline.training.card import write_json, write_record
from siftline.training.schedule import Schedule, budget_schedule, epochs_schedule
from siftline.training.sft import FineTune, last_checkpoint, load_model, make_trainer, sft_arguments


@dataclass(frozen=True)
class TrainResult:
    """What a fine-tuning run left.

    Attributes:
        model_dir: The model directory; see the module's docstring.
        adapter_dir: The LoRA adapter in it, or None.
        curve: step (from 1), loss (nats a loss token), learning_rate, loss_tokens (so far).
        loss_tokens: Loss tokens trained on.
        steps: Optimizer steps.
        rows: Rows seen, repeats included.
        skipped: Rows left out, in the columns of `selection.DECISION`.
        facts: What the model card says, JSON-serialisable.
    """

    model_dir: Path
    adapter_dir: Path | None
    curve: pl.DataFrame
    loss_tokens: int
    steps: int
    rows: int
    skipped: pl.DataFrame
    facts: dict[str, Any]


def _read(data: Sequence[Path] | pa.Table) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    import pyarrow.parquet as pq

    if not data:
        raise ValueError("no Parquet shard to train on: give the files of a version's data folder")
    tables = []
    for path in data:
        names = pq.read_schema(path).names
        missing = {"id", "messages"} - set(names)
        if missing:
            raise ValueError(f"{path} has no column {sorted(missing)}: give a curated version")
        wanted = [name for name in ("id", "messages", "tools") if name in names]
        tables.append(pq.read_table(path, columns=wanted))
    return pa.concat_tables(tables)


def _schedule(
    tokenizer: Any, data: Sequence[Path] | pa.Table, config: FineTune, seed: int, devices: int
) -> Schedule:
    rows = tokenize_rows(_read(data), tokenizer, config.max_length)
    parts = config.accumulation * devices
    if config.loss_tokens is None or config.steps is None:
        return epochs_schedule(
            rows, epochs=config.epochs, batch_rows=config.batch_rows, parts=parts, seed=seed
        )
    return budget_schedule(
        rows, loss_tokens=config.loss_tokens, steps=config.steps, parts=parts, seed=seed
    )


def _facts(
    base: Path,
    schedule: Schedule,
    config: FineTune,
    arguments: Any,
    seed: int,
    dataset_version: str,
) -> dict[str, Any]:
    """What identifies a run and what it will see; `run` is the hash of what decides the weights."""
    from siftline.scoring.fingerprint import directory_digest

    rows = schedule.rows
    content = hashlib.blake2b(digest_size=20)
    for array in (rows.tokens, rows.offsets, rows.starts, np.concatenate(schedule.passes)):
        content.update(array.tobytes())
    decisive = {name: value for name, value in asdict(config).items() if name != "save_steps"}
    base_fingerprint = directory_digest(base)
    return {
        "run": digest(base_fingerprint, decisive, seed, content.hexdigest(), arguments.world_size),
        "dataset_version": dataset_version,
        "base_fingerprint": base_fingerprint,
        "seed": seed,
        "rows": len(rows.ids),
        "rows_seen": schedule.seen,
        "skipped": dict(sorted(rows.skipped["reason"].value_counts().iter_rows())),
        "loss_tokens": int(schedule.tokens_by_step().sum()),
        "steps": schedule.steps,
        "devices": arguments.world_size,
        "device": arguments.device.type,
        "bf16": bool(arguments.bf16),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def _recorded(path: Path, run: str) -> dict[str, Any] | None:
    """The facts in `path` if it exists and is of this run.

    Raises:
        ValueError: if it is of another run.
    """
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["facts"]
    if facts["run"] != run:
        raise ValueError(
            f"{str(path.parent)!r} holds a run with other data, configuration or seed "
            f"({facts['run'][:12]}, this one is {run[:12]}): name a new folder or remove it"
        )
    return facts


def _export(trainer: Any, tokenizer: Any, base: Path, out: Path) -> None:
    """Writes the weights, in the type the base is stored in, and the tokenizer."""
    from peft import PeftModel
    from transformers import AutoConfig

    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(out / "adapter"))
        model = model.merge_and_unload()
    stored = AutoConfig.from_pretrained(str(base), local_files_only=True)
    model.config.use_cache = stored.use_cache  # training switches it off, generation wants it
    model.to(stored.dtype or model.dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _curve(history: Sequence[dict[str, Any]], schedule: Schedule) -> pl.DataFrame:
    lines = [
        {name: line[name] for name in ("step", "loss", "learning_rate")}
        for line in history
        if "loss" in line
    ]
    spent = pl.Series("loss_tokens", schedule.tokens_by_step().cumsum())
    assert len(lines) == schedule.steps, f"{len(lines)} losses for {schedule.steps} steps"
    return pl.DataFrame(lines, infer_schema_length=None).with_columns(spent)


def _result(out: Path, facts: dict[str, Any]) -> TrainResult:
    adapter = out / "adapter"
    return TrainResult(
        model_dir=out,
        adapter_dir=adapter if adapter.is_dir() else None,
        curve=pl.read_csv(out / "curve.csv"),
        loss_tokens=facts["loss_tokens"],
        steps=facts["steps"],
        rows=facts["rows_seen"],
        skipped=pl.read_csv(out / "skipped.csv", schema=DECISION),
        facts=facts,
    )


def finetune(
    base: Path,
    data: Sequence[Path] | pa.Table,
    out: Path,
    config: FineTune,
    *,
    seed: int,
    dataset_version: str,
    template: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainResult:
    """Fine-tunes `base` on curated rows and writes a model directory.

    Started again on the same `out`, it goes on from the last whole checkpoint, or returns what a
    finished run recorded. On one CPU the weights are the same bytes either way. For several devices
    start it under `accelerate launch` or `torchrun`; the first process writes.

    Args:
        base: Model directory to start from.
        data: Parquet shards of a curated version, or a table with `id` and `messages`.
        out: The model directory to make; the module's docstring lists its files.
        config: How to train.
        seed: Of the order of rows and of the adapter's first weights.
        dataset_version: Name of the dataset version, for the model card.
        template: Jinja chat template; None takes the tokenizer's, else QUESTION_ANSWER.
        progress: Called with (steps done, steps in all) after every step.

    Raises:
        ValueError: if no row can be trained on, the budget can't be laid out in its steps, or `out`
            holds another run.
    """
    from siftline.scoring.engines import ModelSpec
    from siftline.scoring.templates import load_tokenizer

    tokenizer = load_tokenizer(ModelSpec(path=str(base), template=template))
    arguments = sft_arguments(config, out / "checkpoints", seed)
    schedule = _schedule(tokenizer, data, config, seed, arguments.world_size)
    facts = _facts(base, schedule, config, arguments, seed, dataset_version)
    finished = _recorded(out / "training.json", facts["run"])
    if finished is not None:
        return _result(out, finished)
    checkpoints = out / "checkpoints"
    started_before = _recorded(checkpoints / "run.json", facts["run"]) is not None
    checkpoint = last_checkpoint(checkpoints)
    trainer = make_trainer(load_model(base, config, seed), tokenizer, arguments, schedule, progress)
    if not started_before and trainer.is_world_process_zero():
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(checkpoints / "run.json", {"facts": facts})
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    facts["seconds"] = round(time.perf_counter() - started, 1)
    facts["resumed"] = checkpoint is not None  # then `seconds` counts only the last stretch
    if trainer.is_world_process_zero():
        _export(trainer, tokenizer, base, out)
        curve = _curve(trainer.state.log_history, schedule)
        write_record(out, curve, schedule.rows.skipped, facts, config)
        shutil.rmtree(checkpoints)
    trainer.accelerator.wait_for_everyone()
    return _result(out, facts)
