"""`siftline train`: fine-tunes a model on a curated version."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.cli.options import json_option, make_tracker, named_recipe, root_option
from siftline.workspace import Workspace

if TYPE_CHECKING:
    from siftline.training.sft import FineTune


@click.command()
@click.argument("curated", metavar="CURATED...", nargs=-1, required=True, type=Path)
@click.option(
    "--model", "base", type=Path, help="Model directory to start from [default: the recipe's]"
)
@click.option("--out", required=True, type=Path, help="Model directory to make, or to go on with.")
@click.option("--recipe", help="Recipe whose training options and target model are taken.")
@root_option
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a training option."
)
@click.option(
    "--dev", multiple=True, type=Path, help="Rows for the dev loss, given like CURATED; again."
)
@click.option("--seed", default=0, show_default=True, help="Of row order and first weights.")
@json_option
def train(
    curated: tuple[Path, ...],
    base: Path | None,
    out: Path,
    recipe: str | None,
    root: Path,
    overrides: tuple[str, ...],
    dev: tuple[Path, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune a model on CURATED and write a model directory.

    CURATED is a published version, the folder of a recipe's versions (the newest is taken), or a
    file or folder of any format that a recipe's pool reads. Started again, it goes on from the last
    checkpoint. For several devices start it as
    `torchrun --nproc-per-node N -m siftline.cli train ...`; to take one of several GPUs, set
    CUDA_VISIBLE_DEVICES.
    """
    from siftline.training.finetune import finetune
    from siftline.training.sft import FineTune

    files, name = _shards(curated)
    options, template = FineTune(), None
    if recipe is not None:
        base, options, template = _of_recipe(recipe, base, root)
    if base is None:
        raise ValueError("no model to start from: give --model DIR, or --recipe")
    config = _changed(options, overrides)
    tracker = make_tracker(f"training {out.name}", 0, "steps")
    try:
        result = finetune(
            base.absolute(),
            files,
            out.absolute(),
            config,
            seed=seed,
            dataset_version=name,
            template=template,
            dev=_shards(dev)[0] if dev else None,
            progress=tracker.reach,
        )
    finally:
        tracker.close()
    if os.environ.get("RANK", "0") == "0":
        told = _told(result)
        click.echo(json.dumps(told) if as_json else _text(told))


def _shards(paths: Sequence[Path]) -> tuple[list[Path], str]:
    """Files of the given places, and what they are called together.

    Raises:
        ValueError: if a place has none.
    """
    from siftline.rows.curated import resolve_latest
    from siftline.rows.published import confirmed_files, is_version

    files: list[Path] = []
    names = []
    for given in paths:
        path = given.absolute()
        if path.is_file():
            found, name = [path], path.name
        else:
            path = resolve_latest(path) if (path / "latest").exists() else path.resolve()
            folder = path / "data" if (path / "data").is_dir() else path
            home = folder.parent if folder.name == "data" else folder
            # What is no folder of Parquet, the reader of the rows knows.
            there = folder.is_dir() and any(folder.iterdir())
            plain = sorted(folder.glob("*.parquet")) or ([folder] if there else [])
            found = confirmed_files(home) if is_version(home) else plain
            name = f"{home.parent.name}/{home.name}"
        if not found:
            raise ValueError(
                f"{given} has no Parquet file: give a published version, or other files of rows"
            )
        files += found
        names.append(name)
    return files, ", ".join(names)


def _of_recipe(name: str, base: Path | None, root: Path) -> "tuple[Path, FineTune, str | None]":
    """Model to start from, options and chat template of a recipe."""
    from siftline.config import build
    from siftline.stages.models import model_spec
    from siftline.training.sft import FineTune

    recipe = named_recipe(name, ())
    options = FineTune()
    if recipe.training is not None:
        epochs = recipe.training.epochs
        options = build(FineTune, asdict(recipe.training.options) | {"epochs": epochs}, "training")
    template = recipe.model("target").spec.template
    if base is None:
        base = Path(model_spec(Workspace(root.absolute()), recipe, "target").path)
    return base, options, template


def _changed(options: "FineTune", overrides: Sequence[str]) -> "FineTune":
    from siftline.config import build, override
    from siftline.training.sft import FineTune

    data = asdict(options)
    for assignment in overrides:
        override(data, assignment)
    return build(FineTune, data, "--set")


def _told(result: Any) -> dict[str, Any]:
    curve = result.curve
    dev = curve["dev_loss"].drop_nulls().to_list() if "dev_loss" in curve.columns else []
    facts = result.facts
    return {
        "model": str(result.model_dir),
        "adapter": str(result.adapter_dir) if result.adapter_dir else None,
        "dataset_version": facts["dataset_version"],
        "steps": result.steps,
        "kept_step": facts["kept_step"],
        "rows": facts["rows"],
        "rows_seen": result.rows,
        "skipped": facts["skipped"],
        "trimmed": facts.get("trimmed", 0),
        "loss_tokens": result.loss_tokens,
        "loss_first": curve["loss"][0],
        "loss_last": curve["loss"][-1],
        "dev_loss_last": dev[-1] if dev else None,
        "dev_loss_best": min(dev) if dev else None,
        "template": facts["template"],
        "packed": facts["packed"],
        "resumed": facts["resumed"],
        "seconds": facts["seconds"],
    }


TEMPLATE = {
    "own": "the model's own",
    "recipe": "the recipe's",
    "question_answer": "none in the model, so rows are 'Question: … Answer: …' (question_answer)",
}


def _text(told: dict[str, Any]) -> str:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in told["skipped"].items())
    lines = [
        f"rows   {told['rows']:>10,}" + (f"  skipped: {skipped}" if skipped else ""),
        f"steps  {told['steps']:>10,}  {told['loss_tokens']:,} loss tokens, "
        f"{told['seconds']:,.0f} seconds" + (" since it went on" if told["resumed"] else ""),
        f"loss   {told['loss_first']:>10.4f}  at first, {told['loss_last']:.4f} at the last step",
    ]
    if told["dev_loss_last"] is not None:
        lines.append(
            f"dev    {told['dev_loss_best']:>10.4f}  at best, {told['dev_loss_last']:.4f} at the "
            f"last; kept: step {told['kept_step']:,}"
        )
    trimmed = told["trimmed"]
    takes = f"; it takes white space off the ends of {trimmed:,} responses" if trimmed else ""
    lines.append(f"chat template: {TEMPLATE[told['template']]}{takes}")
    return "\n".join([*lines, f"model: {told['model']}"])
