"""Pages and figures that stand alone: one HTML document, matplotlib drawings inside as SVG in the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib knows no CSS. It draws in these colours, each used for nothing else, and `to_svg` turns them
# into the page's variables, so that one drawing serves light, dark and print.
INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
FITTED, HELD = "#0b63ce", "#c2410c"
# From small to large: the hues of viridis, made darker or lighter where they would be lost on the paper.
RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa086", "#3ca05a", "#709b26", "#9e8f13")
DARK_RAMP = ("#a56cc9", "#8380d6", "#5391d1", "#339fb0", "#2bb48a", "#57c765", "#a0da39", "#fde725")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FITTED: "fitted", HELD: "held"} | {
    color: f"ramp-{i}" for i, color in enumerate(RAMP)
}

WIDE = 10
"""Columns of a table that is set in smaller type."""

XLINK = "http://www.w3.org/1999/xlink"


def page(title: str, sections: Sequence[str]) -> str:
    """The document: sections of HTML under a title, without any outside file, script or font."""
    return _PAGE.format(title=escape(title), style=_ramps() + _STYLE, body="\n".join(filter(None, sections)))


def figure_section(figure: Figure, name: str, title: str, caption: str) -> str:
    svg = to_svg(figure, name, escape(f"{title}. {caption}"))
    return (
        f"<section><h2>{escape(title)}</h2><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def table_section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    # A table of two columns is words; in a wider one all but the names are figures.
    kind = "words" if len(header) == 2 else "figures" if len(header) < WIDE else "figures wide"
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><th scope='row'>{escape(name)}</th>{values}</tr>"
    return (
        f"<section><h2>{escape(title)}</h2><div class='scroll'><table class='{kind}'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one inline `<svg>` element, with ids of its own and colours from the page's variables.

    `name` starts every id; `description` is what a screen reader says, and must be escaped already.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    # The page's own font and colours; matplotlib's are inline and would win.
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) inherit", r"font-size: \1", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    opening, drawing = svg.split(">", maxsplit=1)
    view_box = opening[opening.index("viewBox=") :].split('"')[1]
    # Without matplotlib's width and height, so that the page sizes it.
    head = f'<svg role="img" aria-label="{description}" viewBox="{view_box}" xmlns:xlink="{XLINK}">'
    return f"{head}<title>{description}</title>{drawing}"


def dress(axes: Axes, title: str) -> None:
    """Give a panel the page's colours and a title."""
    axes.patch.set_alpha(0)
    axes.set_title(title, color=INK, fontsize=11).set_parse_math(False)
    axes.tick_params(which="both", color=MUTED, labelcolor=INK, length=3, labelsize=8.5, labelbottom=True)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)


def _ramps() -> str:
    light, dark = ("".join(f"--ramp-{i}: {color}; " for i, color in enumerate(ramp)) for ramp in (RAMP, DARK_RAMP))
    return (
        f"\n:root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
        f"\n@media print {{ :root {{ {light}}} }}"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #ffffff; --panel: #f6f8fa; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4;
  --fitted: #0b63ce; --held: #c2410c; --good: #1a7f37; --bad: #cf222e; --doubt: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --panel: #161b22; --ink: #e6edf3;
  --muted: #9aa4af; --grid: #30363d; --fitted: #58a6ff; --held: #ff9e64; --good: #3fb950; --bad: #ff7b72;
  --doubt: #d8a629; } }
@media print { :root { --paper: #ffffff; --panel: #ffffff; --ink: #000000; --muted: #444444; --grid: #cccccc;
  --fitted: #0b63ce; --held: #c2410c; } section, figure { break-inside: avoid; } main { padding: 0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1.25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
section { margin: 0 0 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem;
  margin-bottom: 2rem; }
.card { background: var(--panel); border: 1px solid var(--grid); border-left: 4px solid var(--doubt);
  border-radius: 8px; padding: 1rem 1.25rem; margin: 0; }
.card small { color: var(--muted); font-weight: normal; }
.card dl { display: flex; gap: 2rem; margin: .5rem 0; }
.card dt { color: var(--muted); font-size: .85rem; }
.card dd { margin: 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card p { margin: 0; color: var(--muted); font-size: .9rem; }
.inside { border-left-color: var(--good); } .inside strong { color: var(--good); }
.outside { border-left-color: var(--bad); } .outside strong { color: var(--bad); }
.unknown strong { color: var(--doubt); }
.lead { color: var(--muted); }
.warning { border: 1px solid var(--doubt); border-radius: 8px; padding: .75rem 1.25rem; }
.warning h2 { color: var(--doubt); } .warning ul { margin: 0; padding-left: 1.2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--grid); text-align: left;
  vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; } tbody th { font-weight: 500; }
.figures td, .figures thead th:not(:first-child) { white-space: nowrap; text-align: right;
  padding: .35rem 0 .35rem .75rem; }
.wide { font-size: .8rem; } .figures.wide td, .figures.wide thead th:not(:first-child) { padding-left: .5rem; }
.words tbody th { white-space: nowrap; padding-right: 2rem; } .words td { overflow-wrap: anywhere; }
code { font-size: .92em; }
"""
