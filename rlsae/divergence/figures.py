"""The figures of the divergence: every layer by every measure, how far the measures agree, and layer × step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlsae.divergence.table import MEASURES, WHOLE
from rlsae.plots import ACCENT, FAINT, INK, STYLE, Chart, chart, small, standalone

TITLES = {
    "weight_l2_sum": "Weight change (sum of L2 norms)",
    "weight_l2": "Weight change (L2 norm)",
    "weight_l2_relative": "Weight change (relative L2 norm)",
    "activation_l2_relative": "Activation change (relative L2 norm)",
    "activation_cosine": "Activation change (1 − cosine)",
    "activation_cka": "Activation change (1 − linear CKA)",
    "activation_mean_shift": "Shift of the mean activation",
    "activation_residual_shift": "Shift beyond the mean",
    "activation_covariance_shift": "Shift of the covariance",
    "kl_swap_in": "KL of the tuned layer in the base (nats/token)",
    "kl_swap_out": "KL lost without the tuned layer (nats/token)",
    "reward_swap_in": "Reward of the tuned layer in the base",
    "reward_swap_out": "Reward lost without the tuned layer",
}
FAMILIES = {"Weights": ("weight_",), "Activations": ("activation_",), "Function": ("kl_", "reward_")}
"""Beginnings of the names of the measures of each family."""
OVER_STEPS = ("weight_l2_sum", "activation_l2_relative", "kl_swap_out", "reward_swap_out")
"""One or two measures of each family."""
PANEL = (2.9, 1.9)
"""Inches of a panel of a figure file."""


def whole_layers(layers: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole layers; of activations, those of the hook."""
    return layers[(layers.component == WHOLE) | ~layers.measure.str.startswith("weight")]


@rc_context(STYLE)
def save(folder: Path, layers: pd.DataFrame, steps: pd.DataFrame, agreement: pd.DataFrame, chosen: Sequence[int]) -> None:
    """Write `layers.svg`, `agreement.svg` and, where there are checkpoints, `steps.svg`."""
    folder.mkdir()
    rows = whole_layers(layers)
    figure = Figure(figsize=(PANEL[0] * 4, PANEL[1] * 4), layout="constrained")
    panels = figure.subplots(4, 4).flat
    for measure, axes in zip(MEASURES, panels, strict=False):
        draw_bars(axes, rows[rows.measure == measure], chosen)
        axes.set_title(TITLES[measure])
    for axes in panels:  # those that are left
        axes.remove()
    figures = {"layers": figure, "agreement": draw_agreement(agreement)}
    if steps.step.nunique() > 1:
        figures["steps"] = draw_steps(steps)
    for name, drawn in figures.items():
        (folder / f"{name}.svg").write_text(standalone(drawn), encoding="utf-8")


@rc_context(STYLE)
def charts(layers: pd.DataFrame, chosen: Sequence[int]) -> dict[str, list[Chart]]:
    """One small figure per measure for a page, by family."""
    found: dict[str, list[Chart]] = {family: [] for family in FAMILIES}
    for measure, rows in whole_layers(layers).groupby("measure", sort=False):
        figure, axes = small()
        draw_bars(axes, rows, chosen)
        family = next(name for name, beginning in FAMILIES.items() if str(measure).startswith(beginning))
        found[family].append(chart(figure, f"divergence-{measure}", TITLES[str(measure)], rows))
    return found


@rc_context(STYLE)
def agreement_and_steps(steps: pd.DataFrame, agreement: pd.DataFrame) -> list[Chart]:
    """Agreement of the measures and, where there are checkpoints, layer × step, for a page."""
    title = "Agreement of the measures (Kendall's τ over layers)"
    found = [chart(draw_agreement(agreement), "divergence-agreement", title, agreement)]
    if steps.step.nunique() > 1:
        found.append(chart(draw_steps(steps), "divergence-steps", "Each layer over the steps of the tuning", steps))
    return found


def draw_bars(axes: Axes, rows: pd.DataFrame, chosen: Sequence[int]) -> None:
    """A bar per layer with its interval, the chosen layers filled."""
    axes.bar(rows.layer, rows.value, color=[ACCENT if layer in chosen else FAINT for layer in rows.layer], width=0.7)
    known = rows[rows.ci_low.notna()]
    axes.vlines(known.layer, known.ci_low, known.ci_high, color=INK, linewidth=1)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(visible=False, axis="x")


def draw_agreement(agreement: pd.DataFrame) -> Figure:
    """A disc per pair of measures, its area |τ|; hollow where τ is negative, none where it is undefined."""
    place = {measure: number for number, measure in enumerate(dict.fromkeys(agreement.measure))}
    known = agreement.dropna()
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        known.measure.map(place),
        known.other.map(place),
        s=200 * known.kendall_tau.abs(),
        facecolors=[ACCENT if tau > 0 else "none" for tau in known.kendall_tau],
        edgecolors=ACCENT,
    )
    axes.set_xticks(range(len(place)), place, rotation=60, ha="right")
    axes.set_yticks(range(len(place)), place)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    return figure


def draw_steps(steps: pd.DataFrame) -> Figure:
    """A panel per measure of `OVER_STEPS`: layers upwards, steps to the right."""
    figure = Figure(figsize=(PANEL[0] * 2, PANEL[1] * 2), layout="constrained")
    rows = whole_layers(steps)
    for axes, measure in zip(figure.subplots(2, 2).flat, OVER_STEPS, strict=True):
        values_LS = rows[rows.measure == measure].pivot_table(index="layer", columns="step", values="value")
        mesh = axes.pcolormesh(values_LS.to_numpy(), cmap=colormaps["viridis"].resampled(12))
        figure.colorbar(mesh, ax=axes)
        axes.set_xticks(np.arange(len(values_LS.columns)) + 0.5, values_LS.columns)
        axes.set_yticks(np.arange(len(values_LS)) + 0.5, values_LS.index)
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        axes.set_title(TITLES[measure])
        axes.grid(visible=False)
    return figure
