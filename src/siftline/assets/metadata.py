"""What a materialization shows: numbers that plot over time, reasons, a small picture."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Bounds
from siftline.report import plots
from siftline.rows.ledger import DECISIONS, FAILED, Accounting, StageOutput, reasons


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """Dagster's column schema of an Arrow schema."""
    return dg.TableSchema([dg.TableColumn(field.name, str(field.type)) for field in schema])


def picture(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """A PNG inside Markdown: Dagster has no image type."""
    return dg.MetadataValue.md(plots.as_markdown(png, alt))


def numbers(facts: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers among a stage's facts; Dagster plots them over materializations."""
    canaries = {f"canary_{line['kind']}": line["share"] for line in facts.get("canaries", [])}
    return {
        key: value
        for key, value in {**facts, **canaries}.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    }


def shown_before(
    context: dg.AssetExecutionContext, version: str, *names: str
) -> dict[str, Any] | None:
    """What the asset's last materialization showed, to be shown again where nothing was computed.

    Args:
        context: The step's.
        version: Data version that it must be of.
        names: Keys of its metadata; those it does not have are left out.

    Returns:
        None where the last materialization is of another version, or there is none.
    """
    event = context.instance.get_latest_materialization_event(context.asset_key)
    made = event.asset_materialization if event else None
    if made is None or (made.tags or {}).get(DATA_VERSION_TAG) != version:
        return None
    return {name: made.metadata[name] for name in names if name in made.metadata}


def stage_metadata(
    context: dg.AssetExecutionContext, output: StageOutput, computed: bool
) -> dict[str, Any]:
    """Metadata of a stage's materialization; a picture is drawn where something was computed."""
    counts = output.accounting
    before = None
    if not computed:
        before = shown_before(context, output.manifest.version, "picture", "reasons")
    return {
        "dagster/row_count": counts.kept,
        "dagster/column_schema": column_schema(DECISIONS),
        **{f"rows_{name}": value for name, value in counts.as_json().items()},
        **numbers(output.facts),
        "facts": dg.MetadataValue.json(output.facts),
        "computed": computed,
        **(_drawn(counts, output.all_decisions()) if before is None else before),
    }


def _drawn(counts: Accounting, decided: pl.DataFrame) -> dict[str, Any]:
    """The picture and the table of reasons."""
    why = reasons(decided)
    if not why:
        return {"picture": _picture(counts, decided)}
    table = "\n".join(f"| {reason} | {rows:,} |" for reason, rows in why.items())
    return {
        "picture": _picture(counts, decided),
        "reasons": dg.MetadataValue.md(f"| reason | rows |\n| --- | ---: |\n{table}"),
    }


def _picture(counts: Accounting, decided: pl.DataFrame) -> dg.MarkdownMetadataValue:
    drawn = _score_picture(decided)
    if drawn is not None:
        return drawn
    numbers = (np.array([n]) for n in (counts.kept, counts.removed, counts.failed))
    return picture(plots.funnel(["rows"], *numbers), "rows kept and removed")


def _score_picture(decided: pl.DataFrame) -> dg.MarkdownMetadataValue | None:
    """Histogram of the deciding values with their thresholds, where the stage has any."""
    values = decided["value"].drop_nulls().to_numpy()
    thresholds = decided["threshold"].drop_nulls().unique().to_list()
    if len(values) < 2 or len(thresholds) != 1:
        return None
    return picture(plots.histogram(values, thresholds, label="value"), "values and threshold")


CHECKS = ("accounting", "failed_rows", "removed_rows")


def check_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """The blocking checks of every stage."""
    described = {
        "accounting": "in + added = kept + removed + failed",
        "failed_rows": "failed rows stay below the recipe's rate",
        "removed_rows": "a gate does not remove nearly everything",
    }
    return [
        dg.AssetCheckSpec(name, asset=key, blocking=True, description=described[name])
        for name in CHECKS
    ]


def check_results(
    key: dg.AssetKey, stage: Stage, output: StageOutput, bounds: Bounds
) -> list[dg.AssetCheckResult]:
    """Whether the numbers close and stay within the recipe's bounds."""
    counts = output.accounting
    total = counts.rows_in + counts.added
    removable = 1.0 if stage.of.role != "gate" else bounds.max_removed
    why: dict[str, int] = {}
    if counts.failed:
        why = reasons(output.all_decisions().filter(pl.col("outcome") == FAILED))
    sums = (
        f"{counts.rows_in:,} in + {counts.added:,} added = {counts.kept:,} kept + "
        f"{counts.removed:,} removed + {counts.failed:,} failed"
    )
    return [
        check_result(
            key,
            "accounting",
            counts.closes,
            sums if counts.closes else f"{sums} does not close",
            f"nothing can be trusted that comes after {key.to_user_string()}: run it again with "
            "its folder under stages/ moved away, and report these numbers if they stay",
            {f"rows_{name}": value for name, value in counts.as_json().items()},
        ),
        bounded(
            key,
            "failed_rows",
            counts.failed,
            total,
            "bounds.max_failed",
            bounds.max_failed,
            "see one with siftline explain, mend what its reason names and run again, or raise the "
            "bound",
            why,
        ),
        bounded(
            key,
            "removed_rows",
            counts.removed,
            total,
            "bounds.max_removed",
            removable,
            "look at the reasons above; loosen the gate, or raise the bound if that many are bad",
        ),
    ]


def bounded(
    key: dg.AssetKey,
    name: str,
    rows: int,
    total: int,
    option: str,
    bound: float,
    remedy: str,
    why: Mapping[str, int] | None = None,
    *,
    what: str = "",
) -> dg.AssetCheckResult:
    """Whether a share of rows stays within an option of the recipe.

    Args:
        key: The asset.
        name: The check.
        rows: How many rows it is about, of `total`.
        total: All rows.
        option: What the recipe calls the bound.
        bound: Largest share.
        remedy: What can be done where it does not.
        why: Reasons, by rows.
        what: What happened to the rows; by default the check's name says it.
    """
    share, what = rows / max(1, total), what or name.removesuffix("_rows")
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in (why or {}).items())
    found = f"{rows:,} of {total:,} rows {what}" + (f" ({reasons})" if reasons else "")
    return check_result(
        key,
        name,
        share <= bound,
        f"{found}, {option} is {bound:g}",
        remedy,
        {f"rows_{what}": rows, "share": share, "bound": float(bound)},
    )


def check_result(
    key: dg.AssetKey,
    name: str,
    passed: bool,
    found: str,
    remedy: str,
    numbers: Mapping[str, int | float],
) -> dg.AssetCheckResult:
    """A check's outcome: what was found, what can be done where it failed, numbers that plot."""
    said = found if passed else f"{found}: {remedy}"
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=key,
        passed=bool(passed),
        severity=dg.AssetCheckSeverity.ERROR,
        description=said,
        metadata={"said": said, **numbers},
    )
