"""The frame of a report: HTML and CSS that need no network, and small pictures as SVG."""

from __future__ import annotations

from html import escape

from qframework.graph.table import Table
from qframework.inspect.histogram import Histogram

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --back: #fff; --panel: #f5f7fa;
  --accent: #3b6ea8; --warn: #a33a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #36404d; --back: #14181e;
  --panel: #1c222b; --accent: #7fb0e6; --warn: #ef8a78; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--back); }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p.lead { color: var(--soft); margin: 0 0 1rem; }
nav a { display: inline-block; margin-right: 1rem; color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.tile { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.15rem; overflow-wrap: anywhere; } .tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--panel); } .words { text-align: left; }
.finding { border-left: .25rem solid var(--warn); background: var(--panel); padding: .5rem .8rem; margin: .5rem 0;
  border-radius: .25rem; overflow-wrap: anywhere; }
.finding b { color: var(--warn); } .remedy { color: var(--soft); }
svg.small { width: 9rem; height: 2rem; display: block; } svg.small path { fill: var(--accent); }
.plot { background: #fff; border-radius: .5rem; overflow: hidden; margin: .5rem 0; }
"""


def page(title: str, lead: str, sections: list[tuple[str, str, str]], head: str = "") -> str:
    """A whole page.

    Args:
        title: its heading, as text.
        lead: a sentence below it, as text.
        sections: for each its anchor, its heading as text and its HTML.
        head: further HTML for the head.
    """
    links = "".join(f'<a href="#{a}">{escape(h)}</a>' for a, h, _ in sections)
    body = "".join(
        f'<section id="{a}"><h2>{escape(h)}</h2>{html}</section>' for a, h, html in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style>{head}</head><body><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p><nav>{links}</nav>{body}</body></html>'
    )


def tiles(numbers: list[tuple[str, str]]) -> str:
    """Large numbers with what they are."""
    cells = "".join(
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for n, v in numbers
    )
    return f'<div class="tiles">{cells}</div>'


def table(content: Table, pictures: list[str] | None = None) -> str:
    """A table that scrolls on a narrow screen.

    Args:
        content: headings and rows.
        pictures: HTML for one more column, for each row.
    """

    def cell(kind: str, i: int, text: str) -> str:
        words = ' class="words"' if i < content.text_columns else ""
        return f"<{kind}{words}>{escape(text)}</{kind}>"

    heads = "".join(cell("th", i, h) for i, h in enumerate(content.headings))
    heads += '<th class="words">values</th>' if pictures else ""
    rows = []
    for n, row in enumerate(content.rows):
        cells = "".join(cell("td", i, c) for i, c in enumerate(row))
        rows.append(f"<tr>{cells}{f'<td>{pictures[n]}</td>' if pictures else ''}</tr>")
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def thumbnail(histogram: Histogram) -> str:
    """A histogram as a small picture, of 60 bars at most."""
    counts = histogram.counts
    width = -(-len(counts) // 60)
    bars = [sum(counts[i : i + width]) for i in range(0, len(counts), width)]
    top, step = max([*bars, 1]), 120 / max(1, len(bars))
    points = "".join(
        f"L{i * step:.1f} {30 - 29 * c / top:.1f}H{(i + 1) * step:.1f}" for i, c in enumerate(bars)
    )
    return (
        '<svg class="small" viewBox="0 0 120 30" preserveAspectRatio="none" role="img" aria-label="histogram">'
        f'<path d="M0 30{points}L120 30Z"/></svg>'
    )
