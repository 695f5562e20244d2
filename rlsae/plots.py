"""The look of all figures, as SVG without any date or random name: equal data give equal bytes.

They are drawn in stand-in colours, which are replaced by variables of a page's style sheet, so that a figure follows its light
or dark scheme, or by fixed colours in a file of its own.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, ACCENT = "#010101", "#020202", "#030303"
ROLE = {"base": "#040404", "tuned": "#050505"}
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", ACCENT: "var(--accent)"} | {
    colour: f"var(--{role})" for role, colour in ROLE.items()
}
FIXED = {INK: "#222222", FAINT: "#c9c9c9", ACCENT: "#7a3e9d", ROLE["base"]: "#3a6ea5", ROLE["tuned"]: "#c8553d"}
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
    """One figure of a page."""

    title: str
    svg: Markup


def small() -> tuple[Figure, Axes]:
    """A small figure with one pair of axes."""
    figure = Figure(figsize=SMALL, layout="constrained")
    return figure, figure.subplots()


def standalone(figure: Figure) -> str:
    """A figure as an SVG file."""
    svg = _svg(figure)
    for colour, fixed in FIXED.items():
        svg = svg.replace(colour, fixed)
    return svg


def inline(figure: Figure, title: str) -> Markup:
    """A figure as an `<svg>` element that a page can hold: no fixed size, fonts and colours of the page."""
    svg = _svg(figure)
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
