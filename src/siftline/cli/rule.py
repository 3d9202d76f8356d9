"""`siftline rule`: a rule of quality fitted to one's own runs, from indicators to subset size."""

import json
from pathlib import Path
from typing import Any

import click

from siftline.cli.options import (
    embedding_options,
    json_option,
    make_tracker,
    reading_options,
    source_of,
)


@click.group()
def rule() -> None:
    """Fit a rule for `siftline select linear_rule` on runs of your own (InstructMining)."""


@rule.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@embedding_options
@click.option(
    "--neighbour",
    default=6,
    show_default=True,
    type=click.IntRange(1),
    help="Which nearest neighbour's distance to give, where there are embeddings.",
)
@click.option(
    "--scores",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="What `siftline score` wrote: its numbers become indicators too.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="New folder for scores.parquet."
)
@reading_options
@json_option
def indicators(files: tuple[str, ...], out: Path, as_json: bool, **given: Any) -> None:
    """Compute numbers of every row in FILE... that a rule can be made of.

    Writes scores.parquet: id, file, row, and a column for each indicator: n_words and n_chars of
    the response, n_prompt_words, mtld (lexical diversity of the response), with embeddings knn_6
    (distance to the 6th nearest neighbour), and the numbers of --scores. `siftline select
    linear_rule` reads the folder as its --scores.
    """
    import polars as pl

    from siftline.cli.rule_tables import Asked, write_indicators

    asked = Asked(
        tuple(source_of(path, given) for path in files),
        embeddings=given["embeddings"],
        embedding_column=given["embedding_column"],
        embedder=given["embedder"],
        neighbour=given["neighbour"],
        scores=given["scores"],
    )
    table = write_indicators(asked, out.absolute(), make_tracker)
    path = str(out.absolute() / "scores.parquet")
    known = {
        name: {"rows": table[name].count(), "mean": table.select(pl.col(name).mean()).item()}
        for name in table.columns[3:]
    }
    if as_json:
        click.echo(json.dumps({"indicators": known, "rows": table.height, "scores": path}))
        return
    for name, line in known.items():
        mean = "" if line["mean"] is None else f"{line['mean']:>14.6g}"
        click.echo(f"{name:<28}{line['rows']:>12,}{mean}")
    click.echo(f"scores: {path}")


@rule.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.option(
    "--indicators",
    "names",
    required=True,
    metavar="NAME,...",
    help="Columns to predict the loss by: means over the run's set.",
)
@click.option("--loss", default="loss", show_default=True, help="Column of the loss.")
@click.option(
    "--scores",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Indicators of the rows: the means of each run are then those of the rows in its folder.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="New JSON file for the rule."
)
@json_option
def fit(runs: Path, names: str, loss: str, scores: Path | None, out: Path, as_json: bool) -> None:
    """Fit a rule to RUNS, a CSV or Parquet file with a line for every set a model was tuned on.

    A line has the loss reached on dev rows and the mean of each indicator over the set; or, with
    --scores, a column `folder` that names what `siftline select` wrote for it. The log of the loss
    is fitted by ordinary least squares. `siftline select linear_rule --rule FILE` takes the result.
    """
    from siftline.cli.rule_tables import fitted
    from siftline.rows.shards import write_json

    if out.exists():
        raise ValueError(f"{out} exists: name a new file")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    said = fitted(runs, wanted, loss, scores)
    write_json(out, said)
    if as_json:
        click.echo(json.dumps({**said, "rule": str(out)}))
        return
    click.echo(fit_text(said))
    click.echo(f"rule: {out}")


def fit_text(said: dict[str, Any]) -> str:
    """The fit as a table: what a standard deviation of an indicator adds to the log of the loss."""
    width = max(len("indicator"), *(len(line["indicator"]) for line in said["table"])) + 2
    lines = [
        "indicator".ljust(width)
        + "".join(f"{h:>14}" for h in ("coefficient", "low", "high", "inflation", "per unit"))
    ]
    for line in said["table"]:
        numbers = [line[key] for key in ("coefficient", "low", "high", "inflation")]
        numbers.append(said["coefficients"][line["indicator"]])
        lines.append(line["indicator"].ljust(width) + "".join(f"{x:>14.5g}" for x in numbers))
    lines.append(
        f"intercept {said['intercept']:.5g}, R squared {said['r_squared']:.3f}, "
        f"{said['runs']} runs; 95 % intervals of one standard deviation"
    )
    lines += [
        f"beware: {line['indicator']} is inflated {line['inflation']:.0f} times, so neither its "
        "coefficient nor its sign can be read: leave it or one like it out"
        for line in said["table"]
        if line["inflation"] > 10
    ]
    return "\n".join(lines)


@rule.command("next-size")
@click.argument("trials", type=click.Path(path_type=Path))
@click.option("--low", required=True, type=int, help="Smallest size.")
@click.option("--high", required=True, type=int, help="Largest size.")
@click.option("--grid", default=9, show_default=True, help="Sizes tried first, even in ratio.")
@click.option("--size", default="size", show_default=True, help="Column of the size.")
@click.option("--loss", default="loss", show_default=True, help="Column of the loss.")
@json_option
def next_size(
    trials: Path, low: int, high: int, grid: int, size: str, loss: str, as_json: bool
) -> None:
    """Say which number of rows to tune on next, given TRIALS, a CSV or Parquet file.

    A line has the size of a set that the rule chose and the loss reached; several of one size, of
    several seeds, count by their mean. A header alone starts the search.
    """
    import polars as pl

    from siftline.cli.rule_tables import read_runs
    from siftline.selectors.linear_rule import next_size as search

    table = read_runs(trials, [size, loss])
    if not table.select((pl.col(size) > 0) & (pl.col(size) % 1 == 0)).to_series().all():
        raise ValueError(f"{trials}: a {size} is no whole number above 0: give numbers of rows")
    means = table.group_by(size).agg(pl.col(loss).mean())
    known = {int(n): float(value) for n, value in means.select(size, loss).iter_rows()}
    found = search(known, low, high, grid)
    inside = {n: value for n, value in known.items() if low <= n <= high}
    lowest, best = min(((value, n) for n, value in inside.items()), default=(None, None))
    if as_json:
        click.echo(json.dumps({"next": found, "best": best, "loss": lowest}))
        return
    click.echo(f"done: {best}, loss {lowest:.5g}" if found is None else found)
