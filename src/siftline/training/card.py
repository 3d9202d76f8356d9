"""What is written beside a trained model: its card, the training curve as CSV and as a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl


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
