"""Plots as inline SVG, so that a report is one file that needs nothing else."""

import html
import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")
STYLE = {
    "figure.figsize": (6.4, 3.3),
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text: smaller, and drawn in the page's font
}

Series = tuple[str, Sequence[float], Sequence[float]]


def line_plot(title: str, series: Sequence[Series], *, x: str, y: str, marked: Sequence[Series] = ()) -> str:
    """Return an SVG with one line a series, and one line with markers for each of `marked`.

    A marked series takes the colour of the line with the same label. Empty series are left out.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(title, x, y)
    colours: dict[str, str] = {}
    palette = cycle(COLOURS)
    for label, xs, ys in series:
        if len(xs):
            colours[label] = next(palette)
            axes.plot(xs, ys, color=colours[label], linewidth=1.3, label=label, marker="." if len(xs) == 1 else None)
    for label, xs, ys in marked:
        if len(xs):
            colour = colours.get(label) or next(palette)
            name = f"{label} (held-out)" if label in colours else label
            axes.plot(xs, ys, color=colour, linewidth=1, linestyle="--", marker="o", markersize=4, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure, title)


def scatter_plot(title: str, points: Sequence[tuple[str, float, float]], *, x: str, y: str, log_x: bool = False) -> str:
    """Return an SVG with one labelled point for each (label, x, y)."""
    figure, axes = _figure(title, x, y)
    for colour, (label, across, up) in zip(cycle(COLOURS), points, strict=False):
        axes.plot([across], [up], "o", color=colour, markersize=7)
        axes.annotate(label, (across, up), xytext=(6, 5), textcoords="offset points", fontsize=8, color="#334155")
    positions = [across for _, across, _ in points]
    if log_x and positions and min(positions) > 0 and max(positions) > 10 * min(positions):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_plain)
    axes.margins(0.18)
    return _svg(figure, title)


def bar_plot(title: str, bars: Sequence[tuple[str, float]], *, x: str) -> str:
    """Return an SVG with one horizontal bar for each (label, value), top down, the value at its end."""
    figure, axes = _figure(title, x, "")
    drawn = axes.barh(range(len(bars)), [value for _, value in bars], color=COLOURS[0], height=0.55)
    axes.bar_label(drawn, fmt=lambda value: _plain(float(f"{value:.4g}")), fontsize=8, color="#334155", padding=3)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    return _svg(figure, title)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_formatter(_plain)
    return figure, axes


def _plain(value: float, position: float = 0) -> str:
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _svg(figure: Any, title: str) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": title}):  # the same ids for the same figure
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = html.escape(title)  # for who cannot see it
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', lambda _: f'width="100%" role="img" aria-label="{label}"', svg, count=1
    )
