"""What was measured, as one table, and how far the measures agree. Shapes: L layers, R bootstrap resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau

from rlsae.config.studies import Measure

Array = NDArray[np.float64]
WHOLE = "layer"
"""The component that stands for the whole layer."""
MEASURES: tuple[str, ...] = get_args(Measure)


@dataclass(frozen=True)
class Measured:
    """One measure of one component of each layer."""

    measure: str
    component: str
    """`layer`, `attention`, `mlp` or `norms`; for activations the hook of the survey."""
    values_L: Array
    resampled_RL: Array | None = None
    """Its values in bootstrap resamples, where it was sampled."""

    @property
    def distance_L(self) -> Array:
        """How far from 0: what ranks the layers, since a reward can fall."""
        return np.abs(self.values_L)

    @property
    def draws_RL(self) -> Array | None:
        """The resamples, moved so that their mean is the value: the norm of a noisy difference grows when it is resampled."""
        if self.resampled_RL is None:
            return None
        draws_RL = self.resampled_RL + (self.values_L - self.resampled_RL.mean(0))
        return draws_RL if (self.resampled_RL < 0).any() else np.maximum(draws_RL, 0)

    @property
    def ranking(self) -> list[int]:
        """The layers, furthest first."""
        return [int(layer) for layer in np.argsort(-self.distance_L, kind="stable")]


def layer_table(found: Sequence[Measured]) -> pd.DataFrame:
    """One row per layer × measure × component: value, 95 % interval where one was measured, rank (1 = furthest from 0)."""
    tables = []
    for measured in found:
        layers = np.arange(len(measured.values_L))
        low, high = np.full((2, len(layers)), np.nan)
        if measured.draws_RL is not None:
            low, high = np.quantile(measured.draws_RL, [0.025, 0.975], axis=0)
        columns = {"layer": layers, "measure": measured.measure, "component": measured.component}
        columns |= {"value": measured.values_L, "ci_low": low, "ci_high": high, "rank": np.argsort(measured.ranking) + 1}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def of_whole_layers(found: Sequence[Measured]) -> dict[str, Measured]:
    """One entry per measure, in the order of `MEASURES`: parts of a layer left out."""
    parts = {measured.component for measured in found if measured.measure.startswith("weight")} - {WHOLE}
    whole = {m.measure: m for m in found if not (m.measure.startswith("weight") and m.component in parts)}
    return {measure: whole[measure] for measure in MEASURES}


def rank_agreement(found: Sequence[Measured]) -> pd.DataFrame:
    """Kendall's τ-b between the layers' distances by each two measures (Kendall 1945); NaN where one is constant."""
    whole = of_whole_layers(found)
    rows = []
    for one, other in combinations_with_replacement(whole, 2):
        tau = kendalltau(whole[one].distance_L, whole[other].distance_L).statistic
        rows += [{"measure": a, "other": b, "kendall_tau": float(tau)} for a, b in dict.fromkeys([(one, other), (other, one)])]
    order = {measure: place for place, measure in enumerate(whole)}
    return pd.DataFrame(rows).sort_values(["measure", "other"], key=lambda names: names.map(order), ignore_index=True)
