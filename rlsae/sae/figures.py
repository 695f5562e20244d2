"""The figure of a dictionaries artifact: how often latents fire, and how training went, a line per seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlsae.plots import ACCENT, SMALL, STYLE, standalone

BINS = np.linspace(-5, 0, 51)
"""Of log10 of the density, rarer latents in the first; those that never fire are counted in the title."""
CURVES = {"mse": "mean-square error (share of variance)", "l0": "L0 (active latents per row)"}


@rc_context(STYLE)
def save(folder: Path, density: dict[int, NDArray[np.floating]], curves: pd.DataFrame) -> None:
    """Write `training.svg`.

    Args:
        density: share of held-out rows at which each latent fires [F], by seed.
        curves: rows of `metrics.parquet`; none of an autoencoder that was not trained here.
    """
    folder.mkdir()
    columns = [column for column in CURVES if len(curves)]
    figure = Figure(figsize=(SMALL[0] * (1 + len(columns)), SMALL[1]), layout="constrained")
    histogram, *panels = figure.subplots(1, 1 + len(columns), squeeze=False)[0]
    for density_F in density.values():
        counts, _ = np.histogram(np.log10(density_F[density_F > 0]).clip(BINS[0]), BINS)
        histogram.stairs(counts, BINS, color=ACCENT)
    never = ", ".join(f"{(density_F == 0).sum()} (seed {seed})" for seed, density_F in density.items())
    histogram.set(xlabel="log10 of the share of held-out rows", ylabel="latents", title=f"Latents that never fire: {never}")
    for axes, column in zip(panels, columns, strict=True):
        for _, rows in curves.groupby("seed"):
            axes.plot(rows.step, rows[column], color=ACCENT, linewidth=1)
        axes.set(xlabel="step", yscale="log", title=CURVES[column])
    (folder / "training.svg").write_text(standalone(figure), encoding="utf-8")
