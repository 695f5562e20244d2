"""The look of all figures, as SVG without any date or random name: equal data give equal bytes.

They are drawn in stand-in colours, which are replaced by variables of a page's style sheet, so that a figure follows its light
or dark scheme, or by fixed colours in a file of its own.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, ACCENT = "#010101", "#020202", "#030303"
ROLE = {"base": "#040404", "tuned": "#050505"}
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", ACCENT: "var(--accent)"} | {
    colour: f"var(--{role})" for role, colour in ROLE.items()
}
FIXED = {INK: "#1d2328", FAINT: "#c9ced3", ACCENT: "#00795a", ROLE["base"]: "#0072b2", ROLE["tuned"]: "#d55e00"}
"""The colours of the pages' light scheme; those of the roles are Okabe and Ito's, safe for the colour-blind."""
STYLE: dict[str, Any] = {
    "svg.hashsalt": "rlsae",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.4,
}
SMALL = (3.4, 2.1)
"""Inches of a small figure."""


@dataclass(frozen=True)
class Chart:
    """One figure of a page, and the two files that can be downloaded: `{name}.svg` and `{name}.csv`."""

    name: str
    title: str
    svg: Markup
    """As an element of a page."""
    file: str
    """As a file of its own."""
    data: pd.DataFrame
    """What is drawn."""


def small() -> tuple[Figure, Axes]:
    """A small figure with one pair of axes."""
    figure = Figure(figsize=SMALL, layout="constrained")
    return figure, figure.subplots()


def chart(figure: Figure, name: str, title: str, data: pd.DataFrame, label: str | None = None) -> Chart:
    """A figure for a page.

    Args:
        name: of its files; what is no letter, digit or sign of a number in it becomes a hyphen.
        label: what a screen reader says, where the title does not say it all.
    """
    svg = _svg(figure)
    return Chart(re.sub(r"[^\w.]+", "-", name).strip("-"), title, _inline(svg, label or title), _fixed(svg), data)


def standalone(figure: Figure) -> str:
    """A figure as an SVG file."""
    return _fixed(_svg(figure))


def _fixed(svg: str) -> str:
    for colour, fixed in FIXED.items():
        svg = svg.replace(colour, fixed)
    return svg


def _inline(svg: str, title: str) -> Markup:
    """An `<svg>` element that a page can hold: no fixed size, fonts and colours of the page."""
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    svg = f'<svg {view[0]} role="img" aria-label="{escape(title)}">' + svg[svg.index(">") + 1 :]
    for useless in (r"<style.*?</style>", r' id="[\w.]+_\d+"', r"font-family: [^;\"]*;? ?", r"(?m)^ +"):
        svg = re.sub(useless, "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg.strip())


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return buffer.getvalue()
