"""The figures of interventions and explanations: dose and response, and how well explanations predict."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlsae.plots import ACCENT, INK, ROLE, SMALL, STYLE, Chart, chart, small
from rlsae.report.content import records

SETS = {"reward": "reward latents", "tagged": "tagged latents"}
CONTROLS = {
    "scores": "own explanation",
    "other_latents_explanation": "another latent's",
    "shuffled_activations": "shuffled activations",
}
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0, "intruder": 0.2}


@rc_context(STYLE)
def dose_response(steering: pd.DataFrame) -> list[Chart]:
    """A figure per layer × dictionary: reward against what the reward latents are multiplied by, in both models."""
    charts = []
    of_reward = steering[steering.set == "reward"]
    for (layer, name), rows in of_reward.groupby(["layer", "dictionary"], sort=False):
        figure, axes = small()
        for role, mine in rows.groupby("policy"):
            mine = mine.sort_values("gain")
            axes.plot(mine.gain, mine.reward, "o-", color=ROLE[str(role)], markersize=3)
            axes.fill_between(mine.gain, mine.reward_low, mine.reward_high, color=ROLE[str(role)], alpha=0.2, linewidth=0)
        axes.axvline(1, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.set_xlabel("times what they write (1: as it is)")
        axes.set_ylabel("reward")
        title = f"Layer {layer}, {name}"
        label = f"Reward by gain of the reward latents: {title}"
        charts.append(chart(figure, f"dose-response-{layer}-{name}", title, rows, label))
    return charts


@rc_context(STYLE)
def scores(summary: dict[str, Any]) -> list[Chart]:
    """One figure per judge: mean score of each explainer with its interval, and of both controls; a line at chance."""
    charts = []
    for judge, chance in CHANCE.items():
        explainers = sorted({name.split(" ")[0] for name in summary["scores"] if name.endswith(f" {judge}")})
        if not explainers:
            continue
        figure = Figure(figsize=(SMALL[0], 0.7 + 0.22 * len(explainers)), layout="constrained")
        axes = figure.subplots()
        for control, colour, marker in zip(CONTROLS, (ACCENT, INK, INK), "osx", strict=True):
            for place, explainer in enumerate(explainers):
                found = summary[control].get(f"{explainer} {judge}")
                if found:
                    axes.plot(found["ci95"], [place, place], "-", color=colour, linewidth=0.9)
                    axes.plot(
                        found["mean"],
                        place,
                        marker,
                        color=colour,
                        markersize=4,
                        fillstyle="full" if control == "scores" else "none",
                    )
        axes.axvline(chance, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(explainers)), explainers)
        axes.set_xlabel(f"{judge}, mean over latents")
        data = pd.DataFrame(
            [explainer, name, one["mean"], *one["ci95"], one["latents"]]
            for name in CONTROLS
            for explainer in explainers
            if (one := summary[name].get(f"{explainer} {judge}"))
        ).set_axis(["explainer", "explanation", "mean", "ci_low", "ci_high", "latents"], axis=1)
        charts.append(chart(figure, f"scores-{judge}", judge.capitalize(), data, f"Scores of explanations: {judge}"))
    return charts


@rc_context(STYLE)
def carried(table: pd.DataFrame) -> list[Chart]:
    """A figure per layer: share of the gain of reward that each dictionary's latents carry, ablated and transplanted."""
    charts = []
    for layer, rows in table.dropna(subset=["ablated"]).groupby("layer"):
        figure = Figure(figsize=(SMALL[0] * 1.3, 0.7 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for offset, way, colour, filled in ((-0.13, "ablated", INK, "none"), (0.13, "transplanted", ACCENT, "full")):
            for place, row in enumerate(records(rows)):
                axes.plot([row[f"{way}_low"], row[f"{way}_high"]], [place + offset] * 2, "-", color=colour, linewidth=0.9)
            places = [place + offset for place in range(len(rows))]
            axes.plot(rows[way], places, "o", color=colour, fillstyle=filled, markersize=4, linewidth=0, label=way)
        axes.axvline(0, color=INK, linewidth=0.7, linestyle=(0, (2, 2)))
        labels = [f"{row['dictionary']}, {SETS[row['set']]} ({row['latents']})" for row in records(rows)]
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("share of the gain of reward")
        axes.legend(frameon=False)
        title = f"Layer {layer}"
        charts.append(chart(figure, f"carried-{layer}", title, rows, f"Share of the gain that latents carry: {title}"))
    return charts


def transplant_rows(transplants: pd.DataFrame) -> list[dict[str, Any]]:
    """Levels of one dictionary per layer, the last named; levels without latents are the same for all."""
    kept = transplants.drop_duplicates(["layer", "level"], keep="last")
    return records(kept)
