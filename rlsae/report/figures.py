"""The figures of the report."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from rlsae.plots import ACCENT, FAINT, INK, ROLE, SMALL, STYLE, Chart, chart, small
from rlsae.report.formatting import number

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
COSINES = {
    "mmcs_base_tuned": ("base ↔ tuned, same seed", INK, "none"),
    "mmcs_base_tuned_other_seed": ("base ↔ tuned, other seed", ACCENT, "full"),
    "mmcs_floor": ("floor: two seeds, one model", INK, "full"),
    "mmcs_small_big_base": ("base", ROLE["base"], "full"),
    "mmcs_small_big_base_max": ("base, nearest", ROLE["base"], "full"),
    "mmcs_small_big_tuned": ("tuned", ROLE["tuned"], "full"),
    "mmcs_small_big_tuned_max": ("tuned, nearest", ROLE["tuned"], "full"),
}
"""Label, colour and filling of each dot, in the order of the figure."""


@rc_context(STYLE)
def tuning_curves(history: pd.DataFrame, kl_target: float | None) -> list[Chart]:
    """One small figure per quantity of the history, over batches."""
    charts = []
    for column, title in CURVES.items():
        if column in history:
            figure, axes = small()
            axes.plot(history.batch, history[column], color=ROLE["tuned"])
            if column == "kl" and kl_target is not None:
                axes.axhline(kl_target, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
                axes.annotate("target", (history.batch.min(), kl_target), (0, 2), textcoords="offset points")
            axes.set_xlabel("batch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            charts.append(chart(figure, f"tuning-{column}", title, history[["batch", column]]))
    return charts


@rc_context(STYLE)
def training_curves(curves: dict[tuple[str, int, str], pd.DataFrame]) -> list[Chart]:
    """One figure per layer × dictionary: error above, active latents below; a line per seed, coloured by role."""
    charts = []
    for layer, name in dict.fromkeys((layer, name) for _, layer, name in curves):
        figure = Figure(figsize=(SMALL[0], 2.9), layout="constrained")
        by_role = {role: curves[role, layer, name] for role in ROLE if (role, layer, name) in curves}
        for axes, column, label in zip(figure.subplots(2, sharex=True), ("mse", "l0"), ("squared error", "L0"), strict=True):
            for role, of_role in by_role.items():
                for _, rows in of_role.groupby("seed"):
                    axes.plot(rows.step, rows[column], color=ROLE[role], linewidth=1)
            axes.set_yscale("log", subs=[2, 5])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(label)
        axes.set_xlabel("step")
        data = pd.concat(by_role, names=["role"]).reset_index("role")
        charts.append(chart(figure, f"training-{layer}-{name}", f"Layer {layer}, {name}", data))
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
                above = (rows.dictionary == row["dictionary"]).sum() - 1
                axes.fill_betweenx([place - above - 0.4, place + 0.4], low, high, color=FAINT, linewidth=0)
            axes.plot([low, high], [place, place], color=colour)
            axes.plot(row["value"], place, "o", markersize=5, color=colour, fillstyle=filling)
            axes.annotate(number(row["value"]), (high, place), (6, 0), "data", "offset points", va="center")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 1.1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("mean matched cosine")
        charts.append(chart(figure, f"cosines-{layer}", f"Layer {layer}", rows, f"Matched cosines in layer {layer}"))
    return charts
