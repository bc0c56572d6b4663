"""The figures of several number formats as a picture: a panel for each figure, a bar for each format."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from launch.comparison import Line

_TITLES = {"MB": "MB on disk", "peak MB": "MB of memory at most"}


def plot(lines: "list[Line]", path: Path) -> None:
    """Write a PNG with a panel for each figure and one for quality; a format that was refused is grey and says so."""
    from matplotlib.figure import Figure

    from launch.comparison import columns, shown
    from launch.report_plots import COLOURS

    names = [name for name in columns(lines) if name != "export s"]
    figure = Figure(figsize=(2.6 * (len(names) + 1), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names) + 1)
    places = range(len(lines))
    for panel, name in zip(panels, names, strict=False):
        values = [line.figures.get(name, 0) for line in lines]
        bars = panel.bar(places, values, color=COLOURS[: len(lines)])
        panel.bar_label(
            bars, [shown(line.figures[name]) if name in line.figures else "refused" for line in lines], size=8
        )
        panel.set_title(_TITLES.get(name, name), fontsize=10)
    _quality(panels[-1], lines)
    for panel in panels:
        panel.set_xticks(places, [line.name for line in lines], rotation=30, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _quality(panel: "Axes", lines: "list[Line]") -> None:
    """Draw how each format does, and its limit as a line; fp32 is its source but for rounding."""
    from launch.report_plots import COLOURS

    kinds = ("ratio", "cosine", "accuracy", "same")
    kind = next((kind for kind in kinds for line in lines if line.quality and kind in line.quality), "same")
    checks = [line.quality or {} for line in lines]
    as_source = next((check["source_accuracy"] for check in checks if "source_accuracy" in check), 1.0)
    values = [check.get(kind, as_source if kind == "accuracy" else 1.0) for check in checks]
    limits = [_limit(kind, check) for check in checks]
    for place, (line, value, limit) in enumerate(zip(lines, values, limits, strict=True)):
        # No bars: their length would say nothing where the axis does not begin at 0.
        panel.plot(place, value, "o", color="#94a3b8" if line.refused else COLOURS[place % len(COLOURS)], markersize=9)
        words = f"{value:.3f}" + ("\nrefused" if line.refused else "")
        panel.annotate(words, (place, value), xytext=(0, -9), textcoords="offset points", ha="center", va="top", size=8)
        if limit is not None:
            panel.hlines(limit, place - 0.35, place + 0.35, color="#dc2626", linewidth=1.5)
    shown = [*values, *(limit for limit in limits if limit is not None)]
    margin = max(0.02, 0.35 * (max(shown) - min(shown)))
    panel.set_ylim(max(0.0, min(shown) - margin), max(shown) + margin)
    panel.set_xlim(-0.6, len(lines) - 0.4)
    title = {"ratio": "perplexity / source's", "cosine": "cosine with source", "same": "answers as source"}
    panel.set_title(f"{title.get(kind, kind)} (red: limit)", fontsize=10)


def _limit(kind: str, check: dict[str, Any]) -> float | None:
    """Return where a format is refused, None for fp32, which has no such check."""
    if "limit" not in check:
        return None
    if kind == "accuracy":
        return check["source_accuracy"] - check["limit"]
    return max(check["same_floor"], 1 - check["limit"]) if kind == "same" else check["limit"]
