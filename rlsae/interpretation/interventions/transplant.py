"""How much of the reward comes along when what the tuning changed in a layer is written into the base?

The base generates, and at the layer its rows x are moved by one level of the change after the other
(rlsae/comparison/linear_map.py, write_change.py), all estimated on the stores:

    mean      x + μ_tuned - μ_base
    map       μ_tuned + (x - μ_base)(I + B V_r V_rᵀ)
    tagged    x + Σ_{i tagged} (f_i(x) - f̄_i)(W_i^tuned - W_i^base)
    latents   the same over all latents that fire
    map and tagged, map and latents: the map, and what the latents write beyond it

f being the code of the base's dictionary and W its ridge regressions: nothing of the tuned model has to run. Shapes: B rows,
T positions, D channels, F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.comparison.linear_map import LinearMaps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.write_change import Regression, regress_pair
from rlsae.interpretation.interventions.effects import Effects, Place, Treatment, effects, of_blocks
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.statistics import bootstrap_weights
from rlsae.tuning.fixed_prompts import FixedPrompts

COLUMNS = [
    "layer", "dictionary", "seed", "level", "latents", "reward", "reward_base", "reward_tuned", "share", "share_low",
    "share_high", "kl", "perplexity", "distinct_2",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What moves the rows of the base towards those of the tuned model, at one layer."""

    sae: SparseAutoencoder
    """Of the base."""
    maps: LinearMaps
    rank: int
    fit: Regression

    @classmethod
    def estimate(cls, sae: SparseAutoencoder, rows: PairedRows, maps: LinearMaps, rank: int, where: torch.device) -> Change:
        return cls(sae, maps, rank, regress_pair(sae, "base", rows, maps, where))

    def levels(self, tagged: list[int]) -> dict[str, tuple[int, Treatment]]:
        """Latents and treatment of each level of the change, by name."""
        every = torch.nonzero(self.fit.firings_F)[:, 0].tolist()
        identity_DD = self.maps.matrix(0)
        levels = {
            "mean": (0, self._moved([], identity_DD, shift=True)),
            "map": (0, self._moved([], self.maps.matrix(self.rank), shift=True)),
            "tagged": (len(tagged), self._moved(tagged, identity_DD, shift=False)),
            "map and tagged": (len(tagged), self._moved(tagged, self.maps.matrix(self.rank), shift=True)),
            "latents": (len(every), self._moved(every, identity_DD, shift=False)),
            "map and latents": (len(every), self._moved(every, self.maps.matrix(self.rank), shift=True)),
        }
        return {name: level for name, level in levels.items() if tagged or "tagged" not in name}

    def _moved(self, latents: list[int], matrix_DD: Tensor, shift: bool) -> Treatment:
        base_D, tuned_D = self.maps.mean_base_D.float(), self.maps.mean_tuned_D.float()
        slope_DD = (matrix_DD - self.maps.matrix(0)).float()
        index = torch.tensor(latents, dtype=torch.int64, device=base_D.device)
        base_FD, tuned_FD = self.fit.writes_FE[index].chunk(2, 1)
        change_FD, mean_F = (tuned_FD - base_FD @ matrix_DD).float(), self.fit.mean_F[index].float()

        def treatment(acts_BTD: Tensor) -> Tensor:
            moved_BTD = acts_BTD + (acts_BTD - base_D) @ slope_DD + (tuned_D - base_D) * shift
            if not latents:
                return moved_BTD
            latents_BF = self.sae.encode(acts_BTD.flatten(0, 1))[:, index] - mean_F
            return moved_BTD + (latents_BF @ change_FD).view_as(acts_BTD)

        return treatment


def transplants(
    key: dict[str, Any],
    base: Place,
    tuned: PreTrainedModel,
    change: Change,
    tagged: list[int],
    prompts: FixedPrompts,
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each level of the change.

    Args:
        key: `layer` to `seed` of the rows.
        tagged: latents of the base's dictionary with a changed write.

    `share` is the part of the tuning's gain of reward that comes along, with a 95 % bootstrap interval over prompts; nan where
    the tuning gained nothing.
    """
    levels = change.levels(tagged)
    plain_N, goal_N = prompts.rewards(base.model), prompts.rewards(tuned)
    treatments = of_blocks([treatment for _, treatment in levels.values()])
    found: Effects = effects(base, treatments, len(levels), prompts, base.model)
    rows = []
    for e, (name, (latents, _)) in enumerate(levels.items()):
        share, low, high = share_ci95(found.reward_EN[e] - plain_N, goal_N - plain_N)
        rows.append(
            {
                **key,
                "level": name,
                "latents": latents,
                "reward": found.reward_EN[e].mean(),
                "reward_base": plain_N.mean(),
                "reward_tuned": goal_N.mean(),
                "share": share,
                "share_low": low,
                "share_high": high,
                "kl": found.kl_EN[e].mean(),
                "perplexity": found.perplexity(e),
                "distinct_2": found.distinct_2(e),
            }
        )
    return rows


def share_ci95(gained_N: NDArray[np.floating], whole_N: NDArray[np.floating]) -> tuple[float, float, float]:
    """Σ gained / Σ whole with its 95 % bootstrap interval over prompts; nan where the whole is no gain."""
    if whole_N.mean() <= 0:
        return (float("nan"),) * 3
    weights_RN = bootstrap_weights(len(whole_N))
    low, high = np.nanpercentile((weights_RN @ gained_N) / (weights_RN @ whole_N), [2.5, 97.5])
    return float(gained_N.sum() / whole_N.sum()), float(low), float(high)
