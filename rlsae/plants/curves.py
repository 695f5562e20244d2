"""All trials together: recall, coverage and false discovery by the size of the effect, the density and the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlsae.plants.methods import draw_methods, methods
from rlsae.plants.score import planted
from rlsae.plants.trial import DIRECTIONS, SCORES
from rlsae.plants.trials import MAIN
from rlsae.plants.ways import PAIR_WAYS, REPLICATED, TEST
from rlsae.plots import STYLE, standalone
from rlsae.resumable import Stage

KEY = ["method", "variation", "documents", "way"]
DENSITIES = (0, 0.01, 0.02, 0.04, 1)
"""Edges of the bins of how often a direction fires."""
PANEL = (2.9, 2.2)
WAYS = (TEST, REPLICATED, *PAIR_WAYS)


def build_curves(trials: list[Path], out: Path, work: Path | None) -> None:
    """Write `scores.parquet` (a row per trial and way), `summary`, `effects`, `densities` and `methods.tsv`, and the figures
    `curves.svg` and `methods.svg`.

    Args:
        trials: artifacts of `rlsae plant-trial`.
    """
    inputs = {f"{number:03}": folder for number, folder in enumerate(trials)}
    with Stage("plants", out, {}, inputs, work) as stage:
        scores = pd.concat([pd.read_parquet(folder / SCORES) for folder in trials], ignore_index=True)
        directions = pd.concat([pd.read_parquet(folder / DIRECTIONS) for folder in trials], ignore_index=True)
        scores.to_parquet(stage.staging / SCORES, index=False)
        tables = {"summary": summary(scores), "effects": by_effect(directions), "densities": by_density(directions)}
        compared = methods(scores, directions)
        for name, table in (tables | {"methods": compared}).items():
            table.to_csv(stage.staging / f"{name}.tsv", sep="\t", index=False, float_format="%.3f")
        (stage.staging / "figures").mkdir()
        for name, figure in (("curves", draw(tables)), ("methods", draw_methods(compared))):
            (stage.staging / "figures" / f"{name}.svg").write_text(standalone(figure), encoding="utf-8")
        stage.publish({})


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over truth seeds of every score by method, plant, rows and way, with the worst of some."""
    groups = scores.groupby(KEY, sort=False)
    numbers = ["recall", "coverage", "recall_covered", "false_discovery", "kind_accuracy", "tagged", "rank"]
    worst = {"worst_recall_covered": groups.recall_covered.min(), "worst_false_discovery": groups.false_discovery.max()}
    return groups[numbers].mean().assign(**worst, trials=groups.size()).reset_index()


def by_effect(directions: pd.DataFrame) -> pd.DataFrame:
    """Coverage, and recall of the covered, of each kind and size of planted change, over truth seeds.

    Args:
        directions: truth with `covered` and `found` by trial and way.
    """
    changed = directions[directions.kind != "unchanged"]
    size = np.select(
        [changed.kind == "rotated", changed.kind == "rescaled"],
        [" " + changed.angle.astype(int).astype(str) + "°", " ×" + changed.factor.map("{:g}".format)],
        "",
    )
    return _shares(changed.assign(effect=changed.kind + size), "effect")


def by_density(directions: pd.DataFrame) -> pd.DataFrame:
    """Coverage of all directions, and recall of the covered changes, by the share of rows on which a direction fires."""
    bins = pd.cut(directions.density, DENSITIES).map(lambda bounds: f"≤ {bounds.right:.0%}")
    directions = directions.assign(density=bins.astype(str)).iloc[directions.density.argsort()]
    recall = _shares(planted(directions), "density").drop(columns=["directions", "coverage"])
    return _shares(directions, "density").drop(columns="recall").merge(recall)


def _shares(directions: pd.DataFrame, by: str) -> pd.DataFrame:
    """`directions`, `coverage`, and `recall` of the covered ones, by trial and one more column."""
    hit = directions.found.where(directions.covered).astype(float)
    groups = directions.assign(hit=hit).groupby([*KEY, by], sort=False)
    return groups.agg(directions=("kind", "size"), coverage=("covered", "mean"), recall=("hit", "mean")).reset_index()


@rc_context(STYLE)
def draw(tables: dict[str, pd.DataFrame]) -> Figure:
    """Of the main method on the plant at rest: what each way finds by effect, density and rows."""
    shown = {name: table[(table.method == MAIN) & (table.variation == "rest")] for name, table in tables.items()}
    most = shown["summary"].documents.max()
    effects, densities = (shown[name][shown[name].documents == most] for name in ("effects", "densities"))
    rows = shown["summary"].sort_values("documents", kind="stable")
    rows = rows.assign(rows=(100 * rows.documents).map("{:,}".format))
    figure = Figure(figsize=(PANEL[0] * 3, PANEL[1] * 2), layout="constrained")
    panels = figure.subplots(2, 3)
    _lines(panels[0, 0], effects, "effect", "recall", "Recall of covered changes, by effect")
    _lines(panels[0, 1], densities, "density", "recall", "Recall of covered changes, by density")
    seen = densities[densities.way == WAYS[0]]
    _lines(panels[0, 2], seen, "density", "coverage", "Coverage of directions, by density")
    _lines(panels[1, 0], rows, "rows", "recall_covered", "Recall of covered changes, by rows")
    _lines(panels[1, 1], rows, "rows", "false_discovery", "False discovery rate, by rows")
    _lines(panels[1, 2], rows[rows.way == WAYS[0]], "rows", "coverage", "Coverage of changes, by rows")
    panels[0, 0].tick_params(axis="x", rotation=60)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _lines(axes: Axes, table: pd.DataFrame, x: str, y: str, title: str) -> None:
    """A line per way, in its own colour whatever ways there are."""
    for number, way in enumerate(WAYS):
        rows = table[table.way == way]
        axes.plot(rows[x], rows[y], marker="o", markersize=3, label=way, color=f"C{number}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(title)
