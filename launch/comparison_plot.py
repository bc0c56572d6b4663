"""The figures of several number formats as a picture: a panel for each figure, a bar for each format."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.comparison import Line


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
        panel.set_title(name, fontsize=10)
    _quality(panels[-1], lines)
    for panel in panels:
        panel.set_xticks(places, [line.name for line in lines], rotation=30, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _quality(panel: object, lines: "list[Line]") -> None:
    """Draw how each format does beside its limit; fp32 is its source but for rounding."""
    kinds = ("ratio", "cosine", "accuracy", "same")
    kind = next((kind for kind in kinds for line in lines if line.quality and kind in line.quality), "same")
    checks = [line.quality or {} for line in lines]
    as_source = next((check["source_accuracy"] for check in checks if "source_accuracy" in check), 1.0)
    values = [check.get(kind, as_source if kind == "accuracy" else 1.0) for check in checks]
    colours = ["#94a3b8" if line.refused else "#059669" for line in lines]
    bars = panel.bar(range(len(lines)), values, color=colours)  # type: ignore[attr-defined]
    words = [f"{value:.3f}" + ("\nrefused" if line.refused else "") for value, line in zip(values, lines, strict=True)]
    panel.bar_label(bars, words, size=8)  # type: ignore[attr-defined]
    low, high = min(values), max(values)
    margin = max(0.05, high - low)
    panel.set_ylim(max(0.0, low - margin), high + margin)  # type: ignore[attr-defined]
    title = {"ratio": "perplexity / source's", "cosine": "cosine with source", "same": "answers as source"}
    panel.set_title(title.get(kind, kind), fontsize=10)  # type: ignore[attr-defined]
