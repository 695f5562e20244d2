"""Pairs, crosscoders, dictionaries of the difference and stage-wise ones beside each other, on the same plants and budget."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import binomtest

from rlsae.plants.score import planted
from rlsae.plants.trials import METHOD_VARIATIONS, METHODS, NULL
from rlsae.plants.ways import TEST
from rlsae.plots import ACCENT, INK, STYLE

KINDS = ("added", "removed", "rotated", "rescaled")
TRIAL = ["method", "variation", "way"]


def methods(scores: pd.DataFrame, directions: pd.DataFrame) -> pd.DataFrame:
    """A row per method, plant and way, over truth seeds: `trials`, and with 95 % intervals (Wilson 1927) `recall` of the
    planted changes and of each kind, `recall_covered`, `false_discovery` of the tags, `tagged` of the tested latents.

    Intervals take changes and tags as independent.
    """
    scores, directions = (table[table.documents == scores.documents.max()] for table in (scores, directions))
    changed = planted(directions)
    groups = {key: rows for key, rows in changed.groupby(TRIAL, sort=False)}
    found = []
    for key, rows in scores[scores.variation.isin(METHOD_VARIATIONS)].groupby(TRIAL, sort=False):
        row = dict(zip(TRIAL, key, strict=True)) | {"trials": len(rows)}
        truth = groups.get(key, changed.head(0))
        row |= _share("recall", truth.found.sum(), len(truth))
        row |= _share("recall_covered", truth.found[truth.covered].sum(), truth.covered.sum())
        row |= _share("false_discovery", (rows.false_discovery * rows.tags).sum(), rows.tags.sum())
        row |= _share("tagged", rows.tags.sum(), rows.tested.sum())
        for kind in KINDS:
            row |= _share(kind, truth.found[truth.kind == kind].sum(), (truth.kind == kind).sum())
        found.append(row)
    table = pd.DataFrame(found)
    order = {method: place for place, method in enumerate(METHODS)}
    return table.sort_values(
        ["variation", "method"], key=lambda of: of.map(order) if of.name == "method" else of, kind="stable"
    )


def _share(name: str, hits: float, of: float) -> dict[str, float]:
    """A share with its interval; nan of nothing."""
    if not of:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    interval = binomtest(round(hits), int(of)).proportion_ci(method="wilson")
    return {name: hits / of, f"{name}_low": interval.low, f"{name}_high": interval.high}


@rc_context(STYLE)
def draw_methods(table: pd.DataFrame) -> Figure:
    """By the test of write changes and by each method's own rule: recall and false discovery on the plants that move."""
    shown = table[~table.variation.str.startswith(NULL)]
    names = [name for name in METHODS if name in set(shown.method)]
    variations = list(dict.fromkeys(shown.variation))
    figure = Figure(figsize=(6.8, 0.9 + 0.42 * max(1, len(names)) * max(1, len(variations))), layout="constrained")
    for axes, (column, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("recall", "Planted changes found"), ("false_discovery", "False tags")),
        strict=True,
    ):
        labels: list[str] = []
        for variation in variations:
            for name in names:
                of_name = shown[(shown.variation == variation) & (shown.method == name)]
                for row in of_name.to_dict("records"):
                    place = len(labels) + (-0.15 if row["way"] == TEST else 0.15)
                    colour = ACCENT if row["way"] == TEST else INK
                    if "replicated" in row["way"] or np.isnan(row[column]):
                        continue
                    axes.plot([row[f"{column}_low"], row[f"{column}_high"]], [place] * 2, color=colour, linewidth=0.8)
                    axes.plot(
                        row[column],
                        place,
                        "o",
                        color=colour,
                        markersize=3.5,
                        fillstyle="full" if row["way"] == TEST else "none",
                    )
                labels.append(f"{name.replace('_', ' ')}, {variation}")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(title)
    axes.invert_yaxis()
    return figure
