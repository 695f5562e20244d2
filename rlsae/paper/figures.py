"""Figures 4, 5, 7 and 8 of arXiv 2310.08164, a panel per study."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlsae.divergence.figures import whole_layers
from rlsae.paper.published import beside
from rlsae.paper.rows import Exhibit, frame, of_studies, probed_words, told
from rlsae.plots import ACCENT, INK, ROLE, SMALL, STYLE, standalone
from rlsae.report.content import records
from rlsae.report.study import Study
from rlsae.report.sweep import dictionaries

WORD = re.compile(r"[a-z']+")
COLUMNS = 3
"""Panels side by side."""


def all_figures(studies: Sequence[Study]) -> list[Exhibit]:
    """Figures 4, 5, 7 and 8."""
    made = []
    for name, title, note, build, draw in FIGURES:
        rows = build(studies)
        made.append(Exhibit(name, title, note, beside(rows, name), _panels(rows, draw) if len(rows) else None))
    return made


@rc_context(STYLE)
def _panels(rows: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None]) -> str:
    names = list(dict.fromkeys(rows.study))
    across, down = min(COLUMNS, len(names)), math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(SMALL[0] * across, SMALL[1] * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        draw(axes, rows[rows.study == name])
        axes.set_title(name)
    for axes in list(panels)[len(names) :]:
        axes.remove()
    return standalone(figure)


def _errors(studies: Sequence[Study]) -> pd.DataFrame:
    """Figure 4: how wrong the probe is about a word, and how often the tuned model writes it."""
    rows = []
    for study, words in probed_words(studies):
        responses = pd.read_parquet(study.tuned / "samples.parquet").response_tuned
        counts = Counter(word for response in responses for word in WORD.findall(response.lower()))
        for row in records(words):
            error = abs(row["predicted"] - row["polarity"])
            rows.append({**told(study), "token": row["word"], "error": error, "generated": counts[row["word"]]})
    return frame(rows, ["token", "error", "generated"])


def _draw_errors(axes: Axes, rows: pd.DataFrame) -> None:
    axes.plot(rows.generated, rows.error, "o", color=ACCENT, markersize=2.5)
    axes.set_xlabel("times in the sampled responses")
    axes.set_ylabel("|probe − VADER|")


def _components(studies: Sequence[Study]) -> pd.DataFrame:
    """Figure 5: the latents of chosen and rejected responses along their principal components."""
    columns = ["pair", "chosen", "first", "second", "share_first", "share_second"]
    return frame([{**who, **row} for who, t in of_studies(studies, "probe_components") for row in records(t)], columns)


def _draw_components(axes: Axes, rows: pd.DataFrame) -> None:
    for chosen, colour, label in ((True, ROLE["base"], "chosen"), (False, ROLE["tuned"], "rejected")):
        some = rows[rows.chosen == chosen]
        axes.plot(some["first"], some.second, "o", color=colour, markersize=2, label=label)
    axes.legend(frameon=False)
    axes.set_xlabel(f"first component ({rows.share_first.iloc[0]:.0%})")
    axes.set_ylabel(f"second ({rows.share_second.iloc[0]:.0%})")


def _divergences(studies: Sequence[Study]) -> pd.DataFrame:
    """Figure 7: the sum of the norms of what the tuning changed, by layer."""
    rows = []
    for study in studies:
        layers = whole_layers(pd.read_parquet(study.divergence / "layers.parquet"))
        for row in records(layers[layers.measure == "weight_l2_sum"]):
            chosen = row["layer"] in study.chosen["layers"]
            rows.append({**told(study), "layer": row["layer"], "divergence": row["value"], "chosen": chosen})
    return frame(rows, ["layer", "divergence", "chosen"])


def _draw_divergences(axes: Axes, rows: pd.DataFrame) -> None:
    axes.bar(rows.layer, rows.divergence, color=[ACCENT if chosen else INK for chosen in rows.chosen], width=0.6)
    axes.set_xticks(rows.layer)
    axes.set_xlabel("layer (chosen ones coloured)")
    axes.set_ylabel("Σ ‖θ' − θ‖₂")


def _l1_sweep(studies: Sequence[Study]) -> pd.DataFrame:
    """Figure 8: means over layers of FVU and L0 by the weight of the L1 norm, where a study has several."""
    who = {study.name: told(study) for study in studies}
    found = dictionaries(studies)
    found = found[found.recipe_architecture == "tied_relu"]
    found = found[found.groupby(["study", "role", "recipe_expansion"]).recipe_l1.transform("nunique") > 1]
    means = found.groupby(["study", "role", "recipe_expansion", "recipe_l1"])[["fvu", "l0"]].mean().reset_index()
    rows = [{**who[row["study"]], **row, "l0_hundredths": row["l0"] / 100} for row in records(means)]
    return frame(rows, ["role", "recipe_expansion", "recipe_l1", "fvu", "l0_hundredths"])


def _draw_l1_sweep(axes: Axes, rows: pd.DataFrame) -> None:
    for (role, _), line in rows.groupby(["role", "recipe_expansion"]):
        axes.plot(line.recipe_l1, line.fvu, "o-", color=ROLE[str(role)], markersize=2.5, label=f"{role}: FVU")
        axes.plot(line.recipe_l1, line.l0_hundredths, "o--", color=ROLE[str(role)], markersize=2.5, label=f"{role}: L0 / 100")
    axes.legend(frameon=False)
    axes.set_xlabel("l1")


FIGURES: list[tuple[str, str, str, Callable[[Sequence[Study]], pd.DataFrame], Callable[[Axes, pd.DataFrame], None]]] = [
    (
        "figure4",
        "Error of the probe and frequency of the token",
        "Frequencies are of the 64 responses of the tuned model that its tuning publishes.",
        _errors,
        _draw_errors,
    ),
    (
        "figure5",
        "Principal components of what the logistic probe reads",
        "Latents of the tuned model, means over the tokens of held-out responses.",
        _components,
        _draw_components,
    ),
    (
        "figure7",
        "Divergence of the layers",
        "In float32; the public code compared weights rounded to eight bits.",
        _divergences,
        _draw_divergences,
    ),
    (
        "figure8",
        "Reconstruction and sparsity by the weight of the L1 norm",
        "FVU on held-out rows, and L0 / 100 as in the paper, as means over layers and seeds.",
        _l1_sweep,
        _draw_l1_sweep,
    ),
]
