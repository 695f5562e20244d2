"""The figures of what changed: write changes, their angles, and how many latents have each tag."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlsae.comparison.kinds import CHANGED, KEY, UNTESTED
from rlsae.plots import ACCENT, FAINT, INK, SMALL, STYLE, Chart, chart, small

POINTS = 600
"""Points of one kind in a figure; a page holds every one of them."""
PAIR = ["layer", "dictionary"]


@rc_context(STYLE)
def write_change(latents: pd.DataFrame, levels: pd.DataFrame) -> list[Chart]:
    """A figure per layer × dictionary: write change against firings; the tested filled, the tagged in colour, lines at τ."""
    charts = []
    for (layer, name), rows in latents[latents.firings > 0].groupby(PAIR, sort=False):
        figure, axes = small()
        tested, tagged = ~rows.tag.isin(UNTESTED), rows.tag.isin(CHANGED)
        for chosen, colour, filled in ((~tested, INK, "none"), (tested & ~tagged, FAINT, "full"), (tagged, ACCENT, "full")):
            shown = rows[chosen]
            shown = shown.sample(min(len(shown), POINTS), random_state=0)
            axes.plot(shown.firings, shown.write_change, "o", color=colour, fillstyle=filled, markersize=2.5, linewidth=0)
        for tau in levels[(levels.layer == layer) & (levels.dictionary == name)].minimum_effect.unique():
            axes.axhline(tau, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows at which it fires")
        axes.set_ylabel("write change Δ")
        title, data = f"Layer {layer}, {name}", rows[[*KEY, "firings", "write_change", "tag"]]
        charts.append(chart(figure, f"write-change-{layer}-{name}", title, data, f"Write change against firings: {title}"))
    return charts


@rc_context(STYLE)
def angles(latents: pd.DataFrame) -> list[Chart]:
    """A figure per layer: by how many degrees the writes of tested latents turn, and those of tagged ones."""
    charts = []
    bins = np.linspace(0, 90, 31).tolist()
    for layer, rows in latents[~latents.tag.isin(UNTESTED)].groupby("layer"):
        figure, axes = small()
        axes.hist(rows.write_angle.clip(upper=90), bins, color=FAINT)
        axes.hist(rows.write_angle[rows.tag.isin(CHANGED)].clip(upper=90), bins, color=ACCENT)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xlabel("angle between the writes, degrees")
        axes.set_ylabel("latents")
        data = rows[[*KEY, "write_angle", "tag"]]
        charts.append(chart(figure, f"angles-{layer}", f"Layer {layer}", data, f"Rotation angles in layer {layer}"))
    return charts


@rc_context(STYLE)
def tag_counts(latents: pd.DataFrame) -> list[Chart]:
    """One figure: tested latents with each kind of change by layer × dictionary, the replicated ones filled."""
    counts = latents[latents.tag.isin(CHANGED)].groupby([*PAIR, "tag"])
    all_of = counts.size().unstack("tag", fill_value=0).reindex(columns=CHANGED, fill_value=0)
    again = counts.replicated.sum().unstack("tag", fill_value=0).reindex(columns=CHANGED, fill_value=0).astype(int)
    pairs = list(dict.fromkeys(zip(latents.layer, latents.dictionary, strict=True)))
    labels = [f"{layer}, {name}: {tag}" for layer, name in pairs for tag in CHANGED]
    figure = Figure(figsize=(SMALL[0] * 1.5, 0.6 + 0.16 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for filled, table, colour in ((False, all_of, INK), (True, again, ACCENT)):
        values = table.reindex(pairs, fill_value=0).to_numpy().ravel()
        style = {"color": colour} if filled else {"fill": False, "edgecolor": colour, "linewidth": 0.7}
        axes.barh(range(len(labels)), values, height=0.7, **style)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("latents; filled: replicated")
    data = pd.DataFrame({"tagged": all_of.stack(), "replicated": again.stack()}).reset_index()
    return [chart(figure, "tags", "Tags", data, "Tags by layer and dictionary")]
