"""The dictionaries of several studies side by side: what each leaves unexplained, at how many active latents."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from rlsae.plots import ROLE, STYLE, Chart, chart
from rlsae.report.study import Study

RECIPE = ("architecture", "expansion", "l1", "k", "l0")
"""Settings that tell recipes apart, where an architecture has them."""
SCORES = ("fvu", "l0", "dead_share")
COSINES = ("mmcs_base_tuned", "mmcs_floor")
COLUMNS = ["study", "role", "layer", "dictionary", *(f"recipe_{key}" for key in RECIPE), *SCORES, *COSINES]


def dictionaries(studies: Sequence[Study]) -> pd.DataFrame:
    """A row of `COLUMNS` per dictionary: its recipe, its scores on held-out rows as means over seeds, its matched cosines.

    The cosines are of base and tuned, in the rows of both; nan where they were not measured.
    """
    rows = []
    for study in studies:
        cosines = study.aggregates.set_index(["layer", "dictionary", "measure"]).value
        for role, layer, name in study.dictionaries:
            manifest = study.manifests[f"{role} layer {layer} {name}"]
            row = {"study": study.name, "role": role, "layer": layer, "dictionary": name}
            row |= {f"recipe_{key}": manifest.parameters.get(key) for key in RECIPE}
            seeds = pd.DataFrame(list(manifest.metrics.values())).reindex(columns=SCORES)
            row |= {score: float(seeds[score].astype(float).mean()) for score in SCORES}
            rows.append(row | {measure: cosines.get((layer, name, measure)) for measure in COSINES})
    return pd.DataFrame(rows, columns=COLUMNS)


@rc_context(STYLE)
def frontier(table: pd.DataFrame) -> Chart:
    """FVU against L0, a dot per dictionary; those of one study, role, layer and architecture are joined.

    Args:
        table: what `dictionaries` returns.
    """
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for (_, role, _, _), line in table.groupby(["study", "role", "layer", "recipe_architecture"], sort=False):
        rising = line.sort_values("l0")
        axes.plot(rising.l0, rising.fvu, "o-", color=ROLE[str(role)], markersize=3.5, linewidth=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("active latents per row (L0)")
    axes.set_ylabel("variance unexplained (FVU)")
    label = "FVU against L0 of every dictionary"
    return chart(figure, "studies-frontier", "Variance unexplained against active latents", table, label)
