"""Figures as inline SVG without any reference, date or random name: equal data give equal bytes.

Their colours are variables of the page's style sheet, so that a figure follows its light or dark scheme.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from rlsae.report.formatting import number

INK, FAINT, ACCENT = "#010101", "#020202", "#030303"
ROLE = {"base": "#040404", "tuned": "#050505"}
VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", ACCENT: "var(--accent)"} | {
    colour: f"var(--{role})" for role, colour in ROLE.items()
}
"""Stand-ins while drawing, and the style sheet's variables that replace them."""
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
CURVES = {
    "reward": "Reward of the rollouts",
    "kl": "KL from the base (nats per response)",
    "kl_coefficient": "KL coefficient β",
    "entropy": "Entropy (nats per token)",
    "response_length": "Response length (tokens)",
    "preference_accuracy": "Pairs preferred rightly in training (share)",
    "margin": "Margin of the implicit reward in training",
    "loss": "Loss",
    "value_loss": "Value loss",
    "clip_fraction": "Clipped policy ratios (share)",
}
MEASURES = {
    "weight_l2_sum": "Weight change (sum of L2 norms)",
    "weight_l2_relative": "Weight change (relative L2 norm)",
    "activation_l2_relative": "Activation change (relative L2 norm)",
}

COSINES = {
    "mmcs_base_tuned": ("base ↔ tuned, same seed", INK, "none"),
    "mmcs_base_tuned_other_seed": ("base ↔ tuned, other seed", ACCENT, "full"),
    "mmcs_floor": ("floor: two seeds, one model", INK, "full"),
    "mmcs_small_big_base": ("base", ROLE["base"], "full"),
    "mmcs_small_big_tuned": ("tuned", ROLE["tuned"], "full"),
}
"""Label, colour and filling of each dot, in the order of the figure."""


@dataclass(frozen=True)
class Chart:
    """One figure of a page."""

    title: str
    svg: Markup


@rc_context(STYLE)
def tuning_curves(history: pd.DataFrame, kl_target: float | None) -> list[Chart]:
    """One small figure per quantity of the history, over batches."""
    charts = []
    for column, title in CURVES.items():
        if column in history:
            figure, axes = _small()
            axes.plot(history.batch, history[column], color=ROLE["tuned"])
            if column == "kl" and kl_target is not None:
                axes.axhline(kl_target, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
                axes.annotate("target", (history.batch.min(), kl_target), (0, 2), textcoords="offset points")
            axes.set_xlabel("batch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            charts.append(Chart(title, inline(figure, title)))
    return charts


@rc_context(STYLE)
def divergence_bars(layers: pd.DataFrame, chosen: list[int]) -> list[Chart]:
    """One small figure per measure: a bar per layer with its interval, the chosen layers filled."""
    charts = []
    for measure, rows in layers.groupby("measure", sort=False):
        figure, axes = _small()
        axes.bar(rows.layer, rows.value, color=[ACCENT if layer in chosen else FAINT for layer in rows.layer], width=0.7)
        known = rows[rows.ci_low.notna()]
        axes.vlines(known.layer, known.ci_low, known.ci_high, color=INK, linewidth=1)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.grid(visible=False, axis="x")
        title = MEASURES.get(str(measure), str(measure))
        charts.append(Chart(title, inline(figure, title)))
    return charts


@rc_context(STYLE)
def training_curves(curves: dict[tuple[str, int, str], pd.DataFrame]) -> list[Chart]:
    """One figure per layer × dictionary: error above, active latents below; a line per seed, coloured by role."""
    charts = []
    for layer, name in dict.fromkeys((layer, name) for _, layer, name in curves):
        figure = Figure(figsize=(SMALL[0], 2.9), layout="constrained")
        for axes, column, label in zip(figure.subplots(2, sharex=True), ("mse", "l0"), ("squared error", "L0"), strict=True):
            for role, colour in ROLE.items():
                for _, rows in curves[role, layer, name].groupby("seed"):
                    axes.plot(rows.step, rows[column], color=colour, linewidth=1)
            axes.set_yscale("log", subs=[2, 5])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(label)
        axes.set_xlabel("step")
        title = f"Layer {layer}, {name}"
        charts.append(Chart(title, inline(figure, title)))
    return charts


@rc_context(STYLE)
def cosine_dots(aggregates: pd.DataFrame) -> list[Chart]:
    """One figure per layer: mean matched cosines as dots with intervals, each dictionary's floor as a band behind its dots.

    Args:
        aggregates: as published, with a `note` that says why a value is missing.
    """
    charts = []
    for layer, rows in aggregates.groupby("layer"):
        figure = Figure(figsize=(5.4, 0.5 + 0.22 * len(rows)), layout="constrained")
        axes = figure.subplots()
        labels = []
        for place, row in enumerate(rows.to_dict("records")):
            label, colour, filling = COSINES[row["measure"]]
            labels.append(f"{row['dictionary']}: {label}")
            if math.isnan(row["value"]):
                axes.annotate(row["note"], (0.01, place), va="center")
                continue
            low, high = row["ci_low"], row["ci_high"]
            if row["measure"] == "mmcs_floor":
                axes.fill_betweenx([place - 2.4, place + 0.4], low, high, color=FAINT, linewidth=0)
            axes.plot([low, high], [place, place], color=colour)
            axes.plot(row["value"], place, "o", markersize=5, color=colour, fillstyle=filling)
            axes.annotate(number(row["value"]), (high, place), (6, 0), "data", "offset points", va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 1.1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("mean matched cosine")
        charts.append(Chart(f"Layer {layer}", inline(figure, f"Matched cosines in layer {layer}")))
    return charts


def inline(figure: Figure, title: str) -> Markup:
    """A figure as an `<svg>` element that a page can hold: no fixed size, fonts and colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    svg = f'<svg {view[0]} role="img" aria-label="{escape(title)}">' + svg[svg.index(">") + 1 :]
    for useless in (r"<style.*?</style>", r' id="[\w.]+_\d+"', r"font-family: [^;\"]*;? ?", r"(?m)^ +"):
        svg = re.sub(useless, "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg.strip())


def _small() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SMALL, layout="constrained")
    return figure, figure.subplots()
