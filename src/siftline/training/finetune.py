"""Fine-tuning on a curated version, with TRL's SFTTrainer.

Rows come templated with the spans that scoring uses, too long ones are reported instead of cut, and
the rows of every optimizer step are planned before training (see `schedule`). So two arms of a
comparison take the same number of steps over the same loss tokens, and a resumed run sees the
batches the killed one would have seen.

The model directory holds config.json, model.safetensors, the tokenizer with its chat template,
README.md (model card), curve.csv, curve.png, skipped.csv, training.json (written last) and, while
training, checkpoints/. With LoRA the adapter is in adapter/ and the weights are the merged ones, so
every engine loads the directory as it is.

What is written beside a trained model: its card, the training curve as CSV and as a picture.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.disk import check_folder, need, writing
from siftline.rows.schema import digest
from siftline.rows.selection import DECISION
from siftline.rows.verified import AlteredError
from siftline.scoring.fingerprint import RETRAIN, confirm_files, record_files
from siftline.training.material import Passes, dev_passes, lay_out, read_rows, training_passes
from siftline.training.schedule import Schedule
from siftline.training.sft import FineTune, check_sharding, last_checkpoint, sft_arguments


def _table(pairs: Mapping[str, Any]) -> str:
    lines = ["| | |", "| --- | --- |"]
    for name, value in pairs.items():
        text = str(value).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


LOSSES = {
    "sft": "cross-entropy",
    "sft_kl": "cross-entropy and divergence from the start",
    "dft": "cross-entropy times the token's own probability (DFT)",
    "asft": "cross-entropy times the token's own probability, and divergence from the start (ASFT)",
    "poft": "preference over the reference models, one value a row (PoFT)",
}
AXES = {
    "sft": "loss (nats a token)",
    "sft_kl": "loss (cross-entropy + KL, nats a token)",
    "dft": "loss (DFT: probability x nats a token)",
    "asft": "loss (ASFT: probability x nats a token, + KL)",
    "poft": "loss (PoFT, nats a row)",
}
"""What the loss of a curve is in."""
TEMPLATES = {
    "own": "Conversations were written with the base model's own chat template.",
    "recipe": "Conversations were written with the chat template of the recipe.",
    "question_answer": "The base model has no chat template: conversations were written as "
    "`Question: …` and `Answer: …`, and the model directory has that as its template.",
}


def _loss(config: Any) -> str:
    """What is learned of a row, by the configuration."""
    said = f"The loss is {LOSSES[config.objective]}, taken on the last assistant turn and its end"
    if config.prompt_weight:
        said += f", and with weight {config.prompt_weight:g} on all that stands before it"
    else:
        said += " only"
    extras = []
    if config.mask_rate:
        extras.append(f"up to {config.mask_rate:.0%} of response tokens are swapped in the input")
    if config.source_balance:
        extras.append(f"sources are evened out with strength {config.source_balance:g}")
    return "; ".join([said, *extras]) + "."


def model_card(facts: Mapping[str, Any], config: Any) -> str:
    """The README.md of a model directory.

    Args:
        facts: What identifies the run; `dataset_version`, `base_fingerprint` and `seed` at least.
        config: The frozen dataclass the run was configured with.

    Returns:
        Markdown with the YAML header that the Hugging Face Hub reads.
    """
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [sft, siftline]
---

# Fine-tuned on {facts["dataset_version"]}

Trained by Siftline with TRL's SFTTrainer on the responses of dataset version
`{facts["dataset_version"]}`. It started from the model with fingerprint
`{facts["base_fingerprint"]}`.

{_loss(config)} The loss of every step is in curve.csv, drawn in curve.png; rows that were left out,
with the reason, are in skipped.csv. {TEMPLATES[facts["template"]]}

## Run

{_table(facts)}

## Configuration

{_table(asdict(config))}
"""


def draw_curve(curve: pl.DataFrame, path: Path, objective: str = "sft") -> None:
    """Draws loss, dev loss where there is one, and learning rate over steps as PNG.

    The dev loss is cross-entropy, whatever the objective.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss = figure.add_subplot()
    loss.plot(curve["step"], curve["loss"], color="tab:blue", linewidth=1)
    if "dev_loss" in curve.columns:
        dev = curve.drop_nulls("dev_loss")
        loss.plot(dev["step"], dev["dev_loss"], color="tab:orange", marker="o", markersize=3)
        loss.legend(["training", "dev (cross-entropy)"], frameon=False)
    loss.set(xlabel="step", ylabel=AXES[objective])
    rate = loss.twinx()
    rate.plot(curve["step"], curve["learning_rate"], color="tab:gray", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON under a dot-name and renames it, so a reader sees all of it or nothing."""
    staged = path.with_name(f".{path.name}")
    staged.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    staged.replace(path)


def write_record(
    out: Path, curve: pl.DataFrame, skipped: pl.DataFrame, facts: Mapping[str, Any], config: Any
) -> None:
    """Writes curve.csv, curve.png, skipped.csv and README.md into `out`, and training.json last.

    Readers may take training.json as the sign that the folder is complete.
    """
    curve.write_csv(out / "curve.csv")
    skipped.write_csv(out / "skipped.csv")
    draw_curve(curve, out / "curve.png", config.objective)
    (out / "README.md").write_text(model_card(facts, config), encoding="utf-8")
    write_json(out / "training.json", {"facts": dict(facts), "config": asdict(config)})


@dataclass(frozen=True)
class TrainResult:
    """What a fine-tuning run left.

    Attributes:
        model_dir: The model directory; see the module's docstring.
        adapter_dir: The LoRA adapter in it, or None.
        curve: step (from 1), loss (nats a loss token), what the objective reports (ce, kl,
            mean_weight, mask_rate), dev_loss at steps that were evaluated, learning_rate,
            loss_tokens (so far).
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


INDIFFERENT = ("save_steps", "report_to", "gradient_checkpointing")
"""Options that change no weight: a run may go on with others."""


def _facts(
    base: Path,
    template: str,
    passes: Passes,
    dev: Passes | None,
    config: FineTune,
    arguments: Any,
    seed: int,
    dataset_version: str,
) -> dict[str, Any]:
    """What identifies a run and what it will see; `run` is the hash of what decides the weights."""
    from siftline.scoring.fingerprint import directory_digest

    schedule, rows = passes.schedule, passes.schedule.rows
    content = hashlib.blake2b(digest_size=20)
    arrays = [rows.tokens, rows.offsets, rows.starts, np.concatenate(schedule.passes)]
    arrays += [passes.row_weights, *([] if passes.references is None else [passes.references])]
    if dev is not None:
        arrays += [dev.schedule.rows.tokens, dev.schedule.rows.offsets, dev.schedule.rows.starts]
    for array in arrays:
        content.update(array.tobytes())
    decisive = {name: value for name, value in asdict(config).items() if name not in INDIFFERENT}
    base_fingerprint = directory_digest(base)
    return {
        "run": digest(base_fingerprint, decisive, seed, content.hexdigest(), arguments.world_size),
        "dataset_version": dataset_version,
        "base_fingerprint": base_fingerprint,
        "template": template,
        "seed": seed,
        "rows": len(rows.ids),
        "rows_seen": schedule.seen,
        "dev_rows": 0 if dev is None else len(dev.schedule.rows.ids),
        "skipped": dict(sorted(rows.skipped["reason"].value_counts().iter_rows())),
        "trimmed": rows.trimmed,
        "weighted_rows": int((passes.row_weights != 1).sum()),
        "loss_tokens": int(schedule.tokens_by_step().sum()),
        "steps": schedule.steps,
        **({"phases": list(schedule.composition)} if schedule.composition else {}),
        "devices": arguments.world_size,
        "device": arguments.device.type,
        "bf16": bool(arguments.bf16),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def _recorded(path: Path, run: str | None = None) -> dict[str, Any] | None:
    """The facts in `path` if it exists and is of this run; of any, where none is given.

    Raises:
        ValueError: if it is of another run.
    """
    if not path.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["facts"]
        theirs = facts["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise AlteredError(f"{path} is not the record of a run ({error}): {RETRAIN}") from error
    if run not in (None, theirs):
        assert run is not None
        raise ValueError(
            f"{str(path.parent)!r} holds a run with other data, configuration or seed "
            f"({theirs[:12]}, this one is {run[:12]}): name a new folder or remove it"
        )
    return facts


REPORTED = ("loss", "ce", "kl", "mean_weight", "mask_rate")


def _curve(history: Sequence[dict[str, Any]], schedule: Schedule) -> pl.DataFrame:
    dev = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    lines = []
    for line in history:
        if "loss" in line:
            told = {name: line[name] for name in ("step", *REPORTED) if name in line}
            if dev:
                told["dev_loss"] = dev.get(line["step"])
            lines.append({**told, "learning_rate": line["learning_rate"]})
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


def finished(out: Path) -> TrainResult | None:
    """What a run left in `out`, whatever it was made of; None where none ended there."""
    facts = _recorded(out / "training.json")
    if facts is None:
        return None
    confirm_files(out)
    return _result(out, facts)


def finetune(
    base: Path,
    data: Sequence[Path] | pa.Table,
    out: Path,
    config: FineTune,
    *,
    seed: int,
    dataset_version: str,
    template: str | None = None,
    dev: Sequence[Path] | pa.Table | None = None,
    references: Mapping[str, float] | None = None,
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
        seed: Of the order of rows, the adapter's first weights and masked thought.
        dataset_version: Name of the dataset version, for the model card.
        template: Jinja chat template; None takes the tokenizer's, else QUESTION_ANSWER.
        dev: Rows for the dev loss, like `data`; never trained on.
        references: For `poft`: mean log-probability by row id; None takes the column.
        progress: Called with (steps done, steps in all) after every step.

    Raises:
        ValueError: if no row can be trained on, the budget can't be laid out in its steps, `out`
            holds another run, the loss is not finite, or memory runs out; it says what helps.
    """
    from siftline.scoring.engines.base import ModelSpec
    from siftline.scoring.templates import load_tokenizer
    from siftline.training.sft import export

    check_sharding(config)
    tokenizer = load_tokenizer(ModelSpec(path=str(base), template=template))
    arguments = sft_arguments(config, out / "checkpoints", seed, dev is not None)
    table = read_rows(data, config)
    schedule = lay_out(tokenizer, table, config, seed, arguments.world_size)
    passes = training_passes(schedule, table, tokenizer, config, seed, references)
    watched = dev_passes(dev, tokenizer, config, schedule)
    whose = _whose_template(template, tokenizer)
    facts = _facts(base, whose, passes, watched, config, arguments, seed, dataset_version)
    done = _recorded(out / "training.json", facts["run"])
    if done is not None:
        confirm_files(out)
        return _result(out, done)
    check_folder(out)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    need(out, weights, "the trained model")
    checkpoints = out / "checkpoints"
    started_before = _recorded(checkpoints / "run.json", facts["run"]) is not None
    checkpoint = last_checkpoint(checkpoints)
    with writing(out), _memory_remedy(config, schedule):
        trainer = _trainer(base, config, seed, arguments, tokenizer, passes, watched, progress)
        if config.report_to == "tensorboard" and trainer.is_world_process_zero():
            trainer.add_callback(_tensorboard(out / "runs"))
        if not started_before and trainer.is_world_process_zero():
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(checkpoints / "run.json", {"facts": facts})
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    facts["seconds"] = round(time.perf_counter() - started, 1)
    facts["resumed"] = checkpoint is not None  # then `seconds` counts only the last stretch
    facts["packed"] = trainer.unpacked_because or "yes"
    facts["kept_step"] = trainer.keep()
    trainer.accelerator.wait_for_everyone()  # the first process removes the checkpoints
    with writing(out):
        export(trainer, tokenizer, base, out)
    if trainer.is_world_process_zero():
        curve = _curve(trainer.state.log_history, schedule)
        write_record(out, curve, schedule.rows.skipped, facts, config)
        record_files(out)
        shutil.rmtree(checkpoints)
    trainer.accelerator.wait_for_everyone()
    return _result(out, facts)


def _whose_template(template: str | None, tokenizer: Any) -> str:
    """Where the chat template in force comes from: recipe, own, or question_answer (none)."""
    from siftline.scoring.templates import QUESTION_ANSWER

    if template is not None:
        return "recipe"
    return "question_answer" if tokenizer.chat_template == QUESTION_ANSWER else "own"


def _trainer(
    base: Path,
    config: FineTune,
    seed: int,
    arguments: Any,
    tokenizer: Any,
    passes: Passes,
    dev: Passes | None,
    progress: Callable[[int, int], None],
) -> Any:
    from siftline.training.objectives import Objective
    from siftline.training.sft import load_model
    from siftline.training.trainer import PlannedTrainer

    return PlannedTrainer(
        model=load_model(base, config, seed, passes.schedule.steps),
        arguments=arguments,
        tokenizer=tokenizer,
        passes=passes,
        objective=Objective(config.objective, config.kl_weight),
        packing=config.packing,
        dev=dev,
        keep_best=config.keep == "best",
        progress=progress,
    )


def _tensorboard(folder: Path) -> Any:
    """Its own default lies among the checkpoints, which go when the run is done."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


@contextmanager
def _memory_remedy(config: FineTune, schedule: Schedule) -> Iterator[None]:
    """Says what helps where memory runs out."""
    from siftline.scoring.engines.batching import ran_out_of_memory

    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        lengths = np.diff(schedule.rows.offsets)
        most = max(int(lengths[part].sum()) for part in schedule.passes)
        help_ = [f"raise accumulation (now {config.accumulation})"]
        help_.append(f"lower batch_rows ({config.batch_rows}) or max_length ({config.max_length})")
        if config.method == "full":
            help_.append("take method lora")
        anew = f"in a new folder {', or '.join(help_)}"
        going = "" if config.gradient_checkpointing else "set gradient_checkpointing and go on, or "
        raise ValueError(
            f"out of memory; a forward pass has up to {most} tokens: {going}{anew}. "
            "Checkpoints are kept"
        ) from error
