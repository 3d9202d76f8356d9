"""What a materialization shows: numbers that plot over time, reasons, a small picture."""

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
    total = max(1, counts.rows_in + counts.added)
    removable = 1.0 if stage.of.role != "gate" else bounds.max_removed
    failed, removed = counts.failed / total, counts.removed / total
    why: dict[str, int] = {}
    if counts.failed:
        why = reasons(output.all_decisions().filter(pl.col("outcome") == FAILED))
    verdicts: dict[str, tuple[bool, dict[str, Any]]] = {
        "accounting": (counts.closes, counts.as_json()),
        "failed_rows": (
            failed <= bounds.max_failed,
            {
                "share": failed,
                "bound": bounds.max_failed,
                "reasons": why,
            },
        ),
        "removed_rows": (removed <= removable, {"share": removed, "bound": removable}),
    }
    return [
        dg.AssetCheckResult(
            check_name=name,
            asset_key=key,
            passed=bool(passed),
            severity=dg.AssetCheckSeverity.ERROR,
            metadata={
                "numbers": dg.MetadataValue.json(shown),
                "said": _said(name, shown, counts, total),
            },
        )
        for name, (passed, shown) in verdicts.items()
    ]


def _said(check: str, shown: dict[str, Any], counts: Accounting, total: int) -> str:
    """The numbers of a check in one line, with what can be done."""
    if check == "accounting":
        return f"{counts.as_json()} does not close: this is a fault of Siftline's, report it"
    if check == "failed_rows":
        why = ", ".join(f"{reason} {n:,}" for reason, n in shown["reasons"].items()) or "no reason"
        return (
            f"{counts.failed:,} of {total:,} rows failed ({why}), bounds.max_failed is "
            f"{shown['bound']:g}: see one with siftline explain, mend it, or raise the bound"
        )
    return (
        f"{counts.removed:,} of {total:,} rows removed, bounds.max_removed is "
        f"{shown['bound']:g}: loosen the gate, or raise the bound"
    )
