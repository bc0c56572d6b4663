"""The report as one HTML page: pieces of markup, all text escaped, nothing loaded from elsewhere."""

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 28px; letter-spacing: -0.02em; margin: 0 0 4px; }
h2 { font-size: 18px; letter-spacing: -0.01em; margin: 40px 0 12px; }
p { margin: 0 0 12px; } .soft, .note { color: var(--soft); } .note { font-size: 13px; margin-top: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin: 22px 0 8px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 13px 16px; }
.card .label { color: var(--soft); font-size: 12px; } .card .value { font-size: 20px; font-weight: 650; }
.card .detail { color: var(--soft); font-size: 12px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(430px, 1fr)); gap: 14px; margin: 14px 0; }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
svg { display: block; height: auto; } svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; background: #f8fafc; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: break-word; } td:first-child { min-width: 90px; }
.state { border-radius: 99px; padding: 1px 9px; font-size: 12px; font-weight: 600; white-space: nowrap; }
.done { background: #dcfce7; color: #166534; } .failed { background: #fee2e2; color: #991b1b; }
.stopped { background: #fef3c7; color: #92400e; } .running, .unknown { background: #e0e7ff; color: #3730a3; }
.warning { background: #fffbeb; border: 1px solid #fde68a; border-radius: 10px; padding: 10px 16px; margin: 12px 0; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px; overflow-x: auto; }
pre { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 560px) { .figures { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } main { padding: 0; } }
"""


class Markup(str):
    """Text that is HTML already; every other string is escaped."""


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """Return the whole document."""
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n{content}\n</main>\n</body>\n</html>\n'
    )


def escape(value: object) -> str:
    """Return the value as HTML text."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def warning(text: str) -> str:
    return f'<div class="warning">{escape(text)}</div>'


def state(name: str) -> Markup:
    """Return a coloured badge for the state of a run."""
    known = name if name in ("done", "failed", "stopped", "running") else "unknown"
    return Markup(f'<span class="state {known}">{escape(name)}</span>')


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return a row of (label, value, detail) boxes."""
    boxes = (
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for label, value, detail in entries
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; columns of numbers are aligned right."""
    right = [all(map(_is_number, cells)) for cells in zip(*rows, strict=True)] or [False] * len(columns)
    head = _line("th", columns, right)
    return f'<div class="scroll"><table>{head}{"".join(_line("td", row, right) for row in rows)}</table></div>'


def _line(tag: str, cells: Sequence[object], right: Sequence[bool]) -> str:
    texts = ("" if cell is None else escape(cell) for cell in cells)
    marks = (' class="number"' if numeric else "" for numeric in right)
    return f"<tr>{''.join(f'<{tag}{mark}>{text}</{tag}>' for text, mark in zip(texts, marks, strict=True))}</tr>"


def _is_number(cell: object) -> bool:
    text = str(cell or "0").replace(",", "")
    return not isinstance(cell, Markup) and text.replace(".", "", 1).lstrip("-").isdigit()


def figures(svgs: Sequence[str]) -> str:
    """Return plots side by side where there is room."""
    return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in svgs)}</div>' if svgs else ""


def details(summary: str, text: str) -> str:
    """Return text that is folded away."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
