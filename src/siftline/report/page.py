"""The report of one run of a recipe: a single HTML page that needs nothing but itself.

`render` is a function of a `Report`: equal reports give equal bytes. Pictures are embedded as PNG,
once for light and once for dark pages; all texts come from data and are escaped by Jinja. A part
that is None is left out, and the page says which stage would have made it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.report import plots
from siftline.rows.card import StageCount

CLUSTERS = {"x": pl.Float64, "y": pl.Float64, "cluster": pl.Int64, "chosen": pl.Boolean}
DIFFICULTY = {"level": pl.String, "before": pl.Int64, "after": pl.Int64}
CURVES = {"arm": pl.String, "step": pl.Int64, "loss": pl.Float64}
ACCURACY = {
    "arm": pl.String,
    "level": pl.String,
    "accuracy": pl.Float64,  # a share, as are its bounds
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
}
PLANTED = {
    "defect": pl.String,
    "stage": pl.String,
    "planted": pl.Int64,
    "caught": pl.Int64,
    "false_drops": pl.Int64,
}
CANARIES = {
    "stage": pl.String,
    "kind": pl.String,
    "sound": pl.Boolean,  # then a removal is a false drop
    "planted": pl.Int64,
    "removed": pl.Int64,
    "share": pl.Float64,  # with its 95 % bounds; null where nothing was judged
    "low": pl.Float64,
    "high": pl.Float64,
}
NOVELTY = {
    "name": pl.String,
    "rows": pl.Int64,
    "contrast": pl.Float64,  # mean over its rows, nats a token
    "example": pl.String,
}
CALIBRATION = {
    "stage": pl.String,
    "low": pl.Float64,
    "high": pl.Float64,
    "confidence": pl.Float64,  # mean of the bin; null without rows, as is the share right
    "right": pl.Float64,
    "rows": pl.Int64,
}
EXAMPLES = {
    "id": pl.String,
    "stage": pl.String,
    "reason": pl.String,
    "value": pl.Float64,
    "threshold": pl.Float64,
    "prompt": pl.String,
    "response": pl.String,
    "matched_id": pl.String,
    "matched_prompt": pl.String,
    "matched_response": pl.String,
}


@dataclass(frozen=True)
class Histogram:
    """One score of the rows that reached a stage.

    Attributes:
        name: Name of the score, with its unit.
        stage: The stage that looked at it.
        values: Shape (n,); values that are not finite are counted, not drawn.
        thresholds: What rows were held against.
    """

    name: str
    stage: str
    values: np.ndarray
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a report shows. Frames have the columns of the constants above; None leaves out.

    Attributes:
        recipe: Name of the recipe.
        version: Version of the curated data.
        model: Name of the target model.
        ran: (what, how) of what ran: engine, implementation, seed, software.
        funnel: The stages in order.
        scores: Score histograms.
        clusters: `CLUSTERS`, one line per prompt.
        difficulty: `DIFFICULTY`, easiest level first.
        curves: `CURVES`.
        accuracy: `ACCURACY`; arms and levels are shown in order of first appearance, and the last
            level of an arm is its overall accuracy.
        planted: `PLANTED`.
        canaries: `CANARIES`, one line per gate and kind.
        novelty: `NOVELTY`, one line per cluster of the rows that a fine-tuned model finds far
            likelier than the model it came from.
        calibration: `CALIBRATION`, the bins of each confidence gate whose rows are known to be
            right or wrong.
        examples: `EXAMPLES`; `pick_examples` makes them.
        notes: What a reader must know before believing the numbers.
    """

    recipe: str
    version: str
    model: str
    ran: tuple[tuple[str, str], ...] = ()
    funnel: tuple[StageCount, ...] = ()
    scores: tuple[Histogram, ...] = ()
    clusters: pl.DataFrame | None = None
    difficulty: pl.DataFrame | None = None
    curves: pl.DataFrame | None = None
    accuracy: pl.DataFrame | None = None
    planted: pl.DataFrame | None = None
    canaries: pl.DataFrame | None = None
    novelty: pl.DataFrame | None = None
    calibration: pl.DataFrame | None = None
    examples: pl.DataFrame | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, columns in (
            ("clusters", CLUSTERS),
            ("difficulty", DIFFICULTY),
            ("curves", CURVES),
            ("accuracy", ACCURACY),
            ("planted", PLANTED),
            ("canaries", CANARIES),
            ("novelty", NOVELTY),
            ("calibration", CALIBRATION),
            ("examples", EXAMPLES),
        ):
            frame = getattr(self, name)
            missing = [] if frame is None else [c for c in columns if c not in frame.columns]
            if missing:
                raise ValueError(f"the report's {name} lack the columns {missing}: add them")


def render(report: Report) -> str:
    """Renders the page.

    Args:
        report: What to show.

    Returns:
        HTML that refers to no other file.
    """
    arms = _arms(report)
    return _template().render(
        report=report,
        tiles=_tiles(report),
        stages={stage.stage for stage in report.funnel},
        widest=max((s.rows_in + s.added for s in report.funnel), default=0),
        histograms=[_histogram(score) for score in report.scores],
        clusters=_clusters(report.clusters),
        difficulty=_difficulty(report.difficulty),
        curves=_curves(report.curves, arms),
        accuracy=_accuracy(report.accuracy, arms),
        planted=None if report.planted is None else report.planted.to_dicts(),
        canaries=None if report.canaries is None else report.canaries.to_dicts(),
        novelty=None if report.novelty is None else report.novelty.to_dicts(),
        calibration=_calibration(report.calibration),
        examples=_examples(report.examples),
    )


def pick_examples(
    removed: pl.DataFrame, matched: pl.DataFrame, *, seed: int, per_reason: int = 2
) -> pl.DataFrame:
    """Draws a few removed rows per stage and reason, beside the kept rows they lost to.

    Args:
        removed: id, stage, reason, value, threshold, matched_id, prompt, response.
        matched: id, prompt, response of the kept rows that `matched_id` names.
        seed: The recipe's seed; the draw is by hash of the id.
        per_reason: Rows for each stage and reason.

    Returns:
        Columns of `EXAMPLES`, sorted by stage, reason and draw.
    """
    draws = pl.Series("draw", uniforms(seed, "report", removed["id"].to_list()), pl.Float64)
    drawn = removed.with_columns(draws).sort("stage", "reason", "draw", "id")
    few = drawn.group_by("stage", "reason", maintain_order=True).head(per_reason)
    names = {"prompt": "matched_prompt", "response": "matched_response", "id": "matched_id"}
    kept = matched.select(list(names)).rename(names)
    joined = few.join(kept, on="matched_id", how="left", maintain_order="left")
    return joined.select(list(EXAMPLES))


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"n": _count, "pct": _percent, "num": _number}
    source = resources.files("siftline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _count(value: int) -> str:
    return f"{value:,}"


def _percent(share: float | None) -> str:
    return "–" if share is None or not np.isfinite(share) else f"{100 * share:.1f} %"  # noqa: RUF001


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"  # noqa: RUF001


@dataclass(frozen=True)
class _Picture:
    alt: str
    light: str
    dark: str


def _picture(alt: str, draw: Callable[..., bytes], *arrays: Any, **options: Any) -> _Picture:
    light, dark = (plots.data_uri(draw(*arrays, dark=d, **options)) for d in (False, True))
    return _Picture(alt, light, dark)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The numbers to see first: (value, what, detail)."""
    tiles = []
    if report.funnel:
        first, last = report.funnel[0], report.funnel[-1]
        removed = sum(stage.removed for stage in report.funnel)
        failed = sum(stage.failed for stage in report.funnel)
        added = sum(stage.added for stage in report.funnel[1:])
        tiles += [
            (_count(first.rows_in + first.added), "rows in the pool", f"{_count(added)} added"),
            (_count(last.kept), "rows selected", f"{_count(failed)} failed"),
            (_count(removed), "rows removed", "each with its reason"),
        ]
    if report.accuracy is not None and report.accuracy.height:
        overall = report.accuracy.unique("arm", keep="last", maintain_order=True)
        best = overall.sort("accuracy", descending=True, nulls_last=True).row(0, named=True)
        detail = f"{best['arm']}, level {best['level']}"
        tiles.append((_percent(best["accuracy"]), "best accuracy", detail))
    return tiles


def _histogram(score: Histogram) -> dict[str, Any]:
    hidden = int((~np.isfinite(score.values)).sum())
    alt = f"histogram of {score.name} at {score.stage}"
    picture = _picture(alt, plots.histogram, score.values, score.thresholds, label=score.name)
    return {"score": score, "hidden": hidden, "rows": len(score.values), "picture": picture}


def _calibration(frame: pl.DataFrame | None) -> list[dict[str, Any]] | None:
    """One picture per gate, with its rows and its expected calibration error."""
    if frame is None:
        return None
    shown = []
    for stage in frame["stage"].unique(maintain_order=True):
        bins = frame.filter((pl.col("stage") == stage) & (pl.col("rows") > 0))
        arrays = [bins[name].to_numpy() for name in list(CALIBRATION)[1:]]
        _, _, confidence, right, rows = arrays
        shown.append(
            {
                "stage": stage,
                "rows": int(rows.sum()),
                "error": float(np.average(np.abs(confidence - right), weights=rows)),
                "picture": _picture(f"reliability of {stage}", plots.reliability, *arrays),
            }
        )
    return shown


def _clusters(frame: pl.DataFrame | None) -> dict[str, Any] | None:
    if frame is None:
        return None
    arrays = [frame[name].to_numpy() for name in CLUSTERS]
    return {
        "prompts": frame.height,
        "chosen": int(frame["chosen"].sum()),
        "clusters": frame["cluster"].n_unique(),
        "drawn": min(frame.height, plots.MAX_POINTS),
        "picture": _picture("map of the prompts by cluster", plots.clusters, *arrays),
    }


def _difficulty(frame: pl.DataFrame | None) -> _Picture | None:
    if frame is None:
        return None
    before, after = frame["before"].to_numpy(), frame["after"].to_numpy()
    alt = "rows by difficulty before and after selection"
    return _picture(alt, plots.difficulty, frame["level"].to_list(), before, after)


def _arms(report: Report) -> list[str]:
    frames = (report.accuracy, report.curves)
    return list(dict.fromkeys(a for f in frames if f is not None for a in f["arm"].to_list()))


def _curves(frame: pl.DataFrame | None, order: list[str]) -> _Picture | None:
    if frame is None:
        return None
    arms = {}
    for name in frame["arm"].unique(maintain_order=True):
        line = frame.filter(pl.col("arm") == name).sort("step")
        arms[name] = (line["step"].to_numpy(), line["loss"].to_numpy())
    return _picture("training loss by step", plots.curves, arms, order=order)


def _accuracy(frame: pl.DataFrame | None, order: list[str]) -> dict[str, Any] | None:
    if frame is None:
        return None
    levels = frame["level"].unique(maintain_order=True).to_list()
    lines, arms = [], {}
    for name in frame["arm"].unique(maintain_order=True):
        cells = {c["level"]: c for c in frame.filter(pl.col("arm") == name).to_dicts()}
        lines.append((name, [cells.get(level) for level in levels]))
        arms[name] = tuple(
            np.array([cells.get(level, {}).get(k) for level in levels], dtype=float)
            for k in ("accuracy", "low", "high")
        )
    picture = _picture("accuracy by level", plots.accuracy, levels, arms, order=order)
    return {"levels": levels, "lines": lines, "picture": picture}


def _examples(frame: pl.DataFrame | None) -> list[tuple[str, list[dict[str, Any]]]] | None:
    if frame is None:
        return None
    stages = frame["stage"].unique(maintain_order=True)
    return [(s, frame.filter(pl.col("stage") == s).to_dicts()) for s in stages]
