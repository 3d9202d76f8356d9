"""`siftline score`: likelihoods of the rows in plain files, without a recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siftline.cli.options import json_option, make_tracker, reading_options, say, source_of

if TYPE_CHECKING:
    import polars as pl

_WHICH = ("transformers", "vllm", "server")
_SHOWN = (
    "n_response_tokens",
    "logprob_mean",
    "logprob_mean_unconditional",
    "perplexity",
    "ifd_loss_ratio",
    "ifd_perplexity_ratio",
    "entropy_mean",
    "top1_rate",
)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--model", required=True, metavar="DIR", help="Model directory; for a server, its tokenizer's."
)
@click.option(
    "--engine",
    type=click.Choice(_WHICH),
    default="transformers",
    show_default=True,
    help="What runs the model.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the tables and their store; new, or of an earlier run.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of weights and activations.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda:0, or several: cuda:0,cuda:1."
)
@click.option(
    "--max-length",
    default=2048,
    show_default=True,
    help="Most tokens of a row; longer ones fail as too_long.",
)
@click.option(
    "--batch-tokens", default=16384, show_default=True, help="Tokens of a batch, padding included."
)
@click.option(
    "--template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Jinja chat template; by default the tokenizer's own.",
)
@click.option(
    "--turns",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Assistant turns that are scored.",
)
@click.option(
    "--detail",
    "details",
    multiple=True,
    type=click.Choice(["entropy", "top1", "pooled"]),
    help="Also report this; may be given again.",
)
@click.option(
    "--gradients",
    type=click.IntRange(1),
    metavar="DIM",
    help="Write gradient features of this many dimensions a checkpoint instead of scores.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="FILE",
    help="For --gradients: rows like those that are wanted; may be given again.",
)
@click.option(
    "--warm-up",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="For --gradients: share of the rows that an adapter is trained on before; 0 for none.",
)
@click.option(
    "--seed", default=0, show_default=True, help="For --gradients: of warm-up and projection."
)
@reading_options
@click.option(
    "--url", help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."
)
@click.option("--served-model", help="Name the server knows the model by.")
@click.option(
    "--revision", help="Names the weights behind a server; scores of another are never met."
)
@click.option("--key-variable", help="Environment variable that holds the server's API key.")
@click.option("--python", help="Interpreter of the vllm worker; by default this one.")
@click.option(
    "--max-failed",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of failed rows above which the exit status is 1; 1 is never.",
)
@json_option
def score(files: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Score the responses in FILE... under a model, without a recipe.

    Writes scores.parquet, one line per input row with its file and row number, and failed.parquet
    with the reason of every row that has no score, to the folder given by --out. The answers are
    kept in a store there: a second run computes nothing, a killed one is taken up where it was.
    With --gradients it writes gradients.parquet, which siftline select less reads.
    FILE is a file, a folder, a glob or a URL in any format a recipe's pool reads.
    """
    from siftline.cli.score_tables import FAILED, SCORES, score_files
    from siftline.scoring.measures.likelihood import Likelihood

    out: Path = given["out"].absolute()
    if given["gradients"] is not None:
        _differentiate(files, given, out, as_json)
        return
    if given["targets"]:
        raise ValueError("--target is for --gradients DIM: leave it out, or give both")
    asked = Likelihood(given["turns"], given["details"])
    sources = [source_of(path, given) for path in files]
    scored = score_files(sources, _spec(given), asked, out, make_tracker)
    rows = scored.scores.height + scored.failed.height
    result = {
        "scores": str(out / SCORES),
        "failed": str(out / FAILED),
        "rows": rows,
        "scored": scored.scores.height,
        "failed_rows": scored.failed.height,
        **scored.reading,
        "trimmed": scored.trimmed,
        "computed": scored.computed,
        "found": scored.found,
        "tokens": scored.tokens,
        "seconds": round(scored.seconds, 3),
        "tokens_per_second": round(scored.tokens / max(scored.seconds, 1e-9), 1),
    }
    reasons = (
        scored.failed["reason"].value_counts().sort(["count", "reason"], descending=[True, False])
    )
    click.echo(json.dumps(result) if as_json else _text(result, scored.scores, reasons))
    _check_failed(scored.failed, rows, "score", given["max_failed"], out / FAILED)


def _check_failed(failed: "pl.DataFrame", rows: int, what: str, most: float, where: Path) -> None:
    if failed.height > most * rows:
        reasons = (
            failed["reason"].value_counts().sort(["count", "reason"], descending=[True, False])
        )
        first = ", ".join(f"{reason} {count}" for reason, count in reasons.head(3).iter_rows())
        raise ValueError(
            f"{failed.height} of {rows} rows have no {what} ({first}), more than --max-failed "
            f"{most:g}: see {where}"
        )


def _differentiate(files: tuple[str, ...], given: dict[str, Any], out: Path, as_json: bool) -> None:
    """Makes gradient features, and says what was made."""
    from siftline.cli.score_tables import FAILED, GRADIENTS, gradient_files
    from siftline.selectors.less import Gradients

    if given["engine"] != "transformers" or given["turns"] != "last" or given["details"]:
        raise ValueError(
            "--gradients goes with --engine transformers and --turns last, without --detail"
        )
    if not given["targets"]:
        raise ValueError("--gradients needs --target FILE: rows like those that are wanted")
    asked = Gradients(dimensions=given["gradients"], share=given["warm_up"])
    made = gradient_files(
        [source_of(path, given) for path in files],
        [source_of(path, given) for path in given["targets"]],
        _spec(given),
        asked,
        given["seed"],
        out,
        make_tracker,
        say,
    )
    counts = {name: value for name, value in vars(made).items() if name != "failed"}
    result = {
        "gradients": str(out / GRADIENTS),
        "failed": str(out / FAILED),
        **counts,
        "failed_rows": made.failed.height,
        "seconds": round(made.seconds, 3),
    }
    shown = "\n".join(f"{name:<12} {value}" for name, value in result.items())
    click.echo(json.dumps(result) if as_json else shown)
    rows = made.rows + made.target_rows + made.failed.height
    _check_failed(made.failed, rows, "gradient", given["max_failed"], out / FAILED)


def _spec(given: dict[str, Any]) -> Any:
    from siftline.scoring.engines.base import ModelSpec, Server

    server = None
    if given["engine"] == "server":
        if given["url"] is None:
            raise ValueError("--engine server needs --url http://HOST:PORT/v1")
        server = Server(
            given["url"], model=given["served_model"], key_variable=given["key_variable"]
        )
    else:
        for name in ("url", "served_model", "key_variable"):
            if given[name] is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is for --engine server, not {given['engine']}")
    template: Path | None = given["template"]
    return ModelSpec(
        path=given["model"],
        engine=given["engine"],
        dtype=given["dtype"],
        device=given["device"],
        max_length=given["max_length"],
        template=template.read_text(encoding="utf-8") if template else None,
        batch_tokens=given["batch_tokens"],
        python=given["python"],
        server=server,
        revision=given["revision"],
    )


def _text(result: dict[str, Any], scores: "pl.DataFrame", reasons: "pl.DataFrame") -> str:
    import numpy as np
    import polars as pl

    """The result as a short table."""
    why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.iter_rows())
    lines = [
        f"rows    {result['rows']:>10,}",
        f"scored  {result['scored']:>10,}",
        f"failed  {result['failed_rows']:>10,}" + (f"  {why}" if why else ""),
        f"tokens  {result['tokens']:>10,}  {result['tokens_per_second']:,.0f} a second",
    ]
    if result["trimmed"]:
        lines.append(f"trimmed {result['trimmed']:>10,}  lost outer white space to the template")
    if scores.height:
        names = ("mean", "5 %", "median", "95 %")
        lines.append(" " * 28 + "".join(f"{name:>10}" for name in names))
        for column in (name for name in _SHOWN if name in scores.columns):
            values = scores[column].drop_nulls().cast(pl.Float64).to_numpy()
            found = [values.mean(), *np.quantile(values, (0.05, 0.5, 0.95))] if len(values) else []
            lines.append(f"{column:<28}" + "".join(f"{value:>10.4g}" for value in found))
    return "\n".join([*lines, f"scores: {result['scores']}", f"failed: {result['failed']}"])
