"""Pictures as PNG bytes: arrays in, the same bytes out, on every run.

Drawn with matplotlib's object API on the Agg canvas, so no display and no pyplot state is involved;
style is matplotlib's own default plus `_STYLE`, whatever a user's matplotlibrc says. The pictures
are reduced to a palette of 48 colours, which keeps each under 100 kB: small enough to be shown as
Markdown metadata in Dagster as well as in the report.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 3500
"""Points of a scatter plot; more neither show nor fit."""


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    paper: str
    ink: str
    muted: str
    grid: str
    kept: str
    removed: str
    failed: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1d2433", "#667085", "#e8ebf0", "#2563c9", "#d1495b", "#d99a1c",
    ("#8a94a6", "#2563c9", "#d99a1c", "#2a9d76", "#8e5bb5", "#d1495b", "#4bb3c4", "#5b6472"),
)  # fmt: skip
DARK = Theme(
    "#181c24", "#e7eaf0", "#98a2b3", "#2b313d", "#6ea3f5", "#ef7b8b", "#e9b84d",
    ("#98a2b3", "#6ea3f5", "#e9b84d", "#5cc9a2", "#bb93db", "#ef7b8b", "#74cfdd", "#c3c9d3"),
)  # fmt: skip

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "siftline",
}


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    import matplotlib.style

    colours = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
    }
    with matplotlib.style.context(["default", _STYLE, colours]):
        yield


def _draw(
    paint: Callable[[Any, Theme], None], *, dark: bool, size: tuple[float, float] = (9.6, 3.2)
) -> bytes:
    """Paints one set of axes and returns the picture as PNG, at 130 dots per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    theme = DARK if dark else LIGHT
    with _style(theme):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        paint(figure.add_subplot(), theme)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).quantize(48).save(out, "PNG", optimize=True)
    return out.getvalue()


def _legend(axes: Any, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _colours(theme: Theme, names: Sequence[str]) -> dict[str, str]:
    return {name: theme.series[i % len(theme.series)] for i, name in enumerate(names)}


def histogram(
    values: np.ndarray,
    thresholds: Sequence[float] = (),
    *,
    label: str = "",
    bins: int = 60,
    dark: bool = False,
) -> bytes:
    """Histogram of one score with the thresholds that decided.

    Args:
        values: Shape (n,); values that are not finite are left out.
        thresholds: Where lines are drawn, in the unit of the values.
        label: Name of the score, with its unit.
        bins: Number of bins.
        dark: Colours for a dark page.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    # One value alone gets room around it, in steps that a float of its size has.
    room = max(0.5, 1e-6 * max(abs(low), abs(high))) if high - low < 1e-9 * abs(high) else 0.0
    edges = np.unique(np.linspace(low - room, high + room, bins + 1))

    def paint(axes: Any, theme: Theme) -> None:
        axes.hist(finite, bins=edges if len(edges) > 1 else 1, color=theme.kept, alpha=0.85)
        for threshold in sorted(set(thresholds)):
            axes.axvline(threshold, color=theme.removed, linewidth=1.4, linestyle=(0, (4, 2)))
            axes.annotate(
                f"{threshold:.4g}",
                (threshold, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -9),
                textcoords="offset points",
                color=theme.removed,
            )
        axes.set(xlabel=label, ylabel="rows")

    return _draw(paint, dark=dark, size=(5.2, 2.8))  # two stand side by side


def clusters(
    x: np.ndarray,
    y: np.ndarray,
    cluster: np.ndarray,
    chosen: np.ndarray,
    *,
    dark: bool = False,
) -> bytes:
    """Map of the prompts: clusters by colour, the chosen ones full, the others faint.

    Args:
        x: Shape (n,).
        y: Shape (n,).
        cluster: Cluster numbers, shape (n,); colours repeat after the series.
        chosen: Booleans, shape (n,).
        dark: Colours for a dark page.
    """
    # By value and not by position, so that the same points give the same picture in any order.
    order = np.lexsort((chosen, cluster, y, x))
    order = order[:: max(1, -(-len(order) // MAX_POINTS))]

    def paint(axes: Any, theme: Theme) -> None:
        colours = np.array(theme.series)[cluster[order].astype(int) % len(theme.series)]
        on = chosen[order].astype(bool)
        px, py = x[order], y[order]
        axes.scatter(px[~on], py[~on], c=colours[~on], s=7, alpha=0.22, linewidths=0)
        axes.scatter(px[on], py[on], c=colours[on], s=11, linewidths=0)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    return _draw(paint, dark=dark, size=(9.6, 4.8))


def _bars(
    groups: Sequence[str],
    series: Mapping[str, np.ndarray],
    colours: Callable[[Theme], Sequence[str]],
    ylabel: str,
    dark: bool,
) -> bytes:
    def paint(axes: Any, theme: Theme) -> None:
        places, width = np.arange(len(groups)), 0.8 / len(series)
        for i, (name, heights) in enumerate(series.items()):
            shift = (i - (len(series) - 1) / 2) * width
            axes.bar(places + shift, heights, width * 0.92, label=name, color=colours(theme)[i])
        axes.set_xticks(places, groups)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel=ylabel)
        _legend(axes)

    return _draw(paint, dark=dark)


def difficulty(
    levels: Sequence[str], before: np.ndarray, after: np.ndarray, *, dark: bool = False
) -> bytes:
    """Share of each difficulty level before and after selection.

    Args:
        levels: m names, easiest first.
        before: Rows of each level in the pool, shape (m,).
        after: Rows of each level in the selection, shape (m,).
        dark: Colours for a dark page.
    """
    shares = {
        name: 100 * counts / max(counts.sum(), 1)
        for name, counts in (("pool", before), ("selected", after))
    }
    return _bars(levels, shares, lambda t: (t.series[0], t.kept), "% of rows", dark)


def curves(
    arms: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    label: str = "training loss",
    order: Sequence[str] = (),
    dark: bool = False,
) -> bytes:
    """One line per arm.

    Args:
        arms: Name to (steps, losses), each of shape (k,).
        label: What the y axis shows, with its unit.
        order: All arms of a report, so that an arm has one colour in every picture.
        dark: Colours for a dark page.
    """

    def paint(axes: Any, theme: Theme) -> None:
        colours = _colours(theme, order or list(arms))
        for name, (steps, losses) in arms.items():
            axes.plot(steps, losses, color=colours[name], linewidth=1.6, label=name)
        axes.set(xlabel="step", ylabel=label)
        _legend(axes)

    return _draw(paint, dark=dark)


def accuracy(
    levels: Sequence[str],
    arms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    order: Sequence[str] = (),
    dark: bool = False,
) -> bytes:
    """Accuracy by level with intervals, one column of points per arm.

    Args:
        levels: m names.
        arms: Name to (accuracy, low, high) as shares, each of shape (m,); NaN is left out.
        order: All arms of a report, so that an arm has one colour in every picture.
        dark: Colours for a dark page.
    """

    def paint(axes: Any, theme: Theme) -> None:
        places, width = np.arange(len(levels)), 0.7 / max(len(arms), 1)
        colours = _colours(theme, order or list(arms))
        for i, (name, (mean, low, high)) in enumerate(arms.items()):
            shift = (i - (len(arms) - 1) / 2) * width
            axes.errorbar(
                places + shift,
                100 * mean,
                yerr=100 * np.stack([mean - low, high - mean]),
                fmt="o",
                markersize=4.5,
                linewidth=1.6,
                color=colours[name],
                label=name,
            )
        axes.set_xticks(places, levels)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="accuracy, %")
        _legend(axes)

    return _draw(paint, dark=dark)


def reliability(
    low: np.ndarray,
    high: np.ndarray,
    confidence: np.ndarray,
    right: np.ndarray,
    rows: np.ndarray,
    *,
    dark: bool = False,
) -> bytes:
    """Reliability diagram: share right by mean confidence, beside the diagonal.

    Args:
        low: Lower edges of the bins, shape (k,).
        high: Upper edges, shape (k,).
        confidence: Mean confidence of each bin, NaN without rows, shape (k,).
        right: Share right of each bin, NaN without rows, shape (k,).
        rows: Rows of each bin, shape (k,).
        dark: Colours for a dark page.
    """
    there = rows > 0

    def paint(axes: Any, theme: Theme) -> None:
        axes.bar(low[there], right[there], (high - low)[there], align="edge", color=theme.series[0])
        axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.0, linestyle=(0, (4, 2)))
        axes.plot(confidence[there], right[there], "o", color=theme.kept, markersize=4.5)
        for x, y, n in zip(confidence[there], right[there], rows[there], strict=True):
            axes.annotate(f"{n:,}", (x, y), xytext=(0, 5), textcoords="offset points", ha="center")
        axes.set(xlim=(0, 1), ylim=(0, 1.12), xlabel="confidence", ylabel="share right")

    return _draw(paint, dark=dark, size=(5.2, 2.8))  # two stand side by side


def funnel(
    stages: Sequence[str],
    kept: np.ndarray,
    removed: np.ndarray,
    failed: np.ndarray,
    *,
    dark: bool = False,
) -> bytes:
    """Rows kept, removed and failed at each stage, first stage on top.

    Args:
        stages: m names.
        kept: Shape (m,).
        removed: Shape (m,).
        failed: Shape (m,).
        dark: Colours for a dark page.
    """

    def paint(axes: Any, theme: Theme) -> None:
        left = np.zeros(len(stages))
        for name, counts in (("kept", kept), ("removed", removed), ("failed", failed)):
            axes.barh(stages, counts, left=left, color=getattr(theme, name), label=name)
            left = left + counts
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="rows")
        _legend(axes)

    return _draw(paint, dark=dark, size=(9.6, 0.8 + 0.3 * len(stages)))


def data_uri(png: bytes) -> str:
    """The picture as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def as_markdown(png: bytes, alt: str = "") -> str:
    """The picture as a Markdown image with the data inside, for Dagster's metadata."""
    safe = "".join(c if c.isalnum() or c in " .,-_" else " " for c in alt)
    return f"![{safe}]({data_uri(png)})"
