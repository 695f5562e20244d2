"""How much of the reward that tuning gained do a few latents of a dictionary carry, whatever rows it was trained on?

Two answers, for a set S of latents and the same prompts with the same noise:

    ablated        the tuned model writes without S: x' = x - Σ_{i in S} f_i W_dec,i
                   share = Σ (R_tuned - R') / Σ (R_tuned - R_base)
    transplanted   the base writes with what S changed: x' = x + Σ_{i in S} (f_i - f̄_i)(W_i^tuned - W_i^base)
                   share = Σ (R' - R_base) / Σ (R_tuned - R_base)

f is the dictionary's code of the tuned model's rows, of both or of their difference, and W its ridge regressions
(rlsae/comparison/write_change.py); where it needs rows of the model that does not write, that one runs beside on the same
tokens. Pairs, crosscoders and dictionaries of the difference stand in one table. Shapes: N prompts, F latents, D channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.beside import AnySae, at_model
from rlsae.comparison.linear_map import LinearMaps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.write_change import Regression, regress_pair
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.interpretation.interventions.effects import Place, Treatment, rewards
from rlsae.interpretation.interventions.transplant import share_ci95
from rlsae.models import Hook
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.tuning.fixed_prompts import FixedPrompts

COLUMNS = [
    "layer", "dictionary", "seed", "reads", "set", "latents", "ablated", "ablated_low", "ablated_high", "transplanted",
    "transplanted_low", "transplanted_high",
]  # fmt: skip


def carried(
    key: dict[str, Any],
    sae: SparseAutoencoder,
    sets: dict[str, list[int]],
    models: dict[str, PreTrainedModel],
    hook: Hook,
    rows: PairedRows,
    maps: LinearMaps,
    prompts: FixedPrompts,
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each set of latents, shares with 95 % bootstrap intervals over prompts.

    Args:
        key: `layer` to `seed` of the rows.
        sae: of the tuned model, or of both; models: base and tuned, by role.
    """
    fit = regress_pair(sae, "tuned", rows, maps, maps.mean_base_D.device)
    base_N, tuned_N = (prompts.rewards(models[role]) for role in ("base", "tuned"))
    found = []
    for name, latents in sets.items():
        row = {**key, "reads": sae.reads, "set": name, "latents": len(latents)}
        with at_model(sae, "tuned", "tuned", models, rows.layer, hook) as seen:
            without_N = _rewards(Place(models["tuned"], rows.layer, hook), edited(seen, [Edit(tuple(latents))]), prompts)
        with at_model(sae, "tuned", "base", models, rows.layer, hook) as seen:
            with_N = _rewards(Place(models["base"], rows.layer, hook), _written(seen, fit, latents), prompts)
        for way, gained_N in (("ablated", tuned_N - without_N), ("transplanted", with_N - base_N)):
            shares = share_ci95(gained_N, tuned_N - base_N)
            row |= dict(zip((way, f"{way}_low", f"{way}_high"), shares, strict=True))
        found.append(row)
    return found


def _rewards(place: Place, treatment: Treatment, prompts: FixedPrompts) -> np.ndarray:
    return rewards(place, lambda _: treatment, 1, prompts)[0]


def _written(seen: AnySae, fit: Regression, latents: list[int]) -> Treatment:
    """What some latents write in tuned beyond base, added to the base's rows."""
    index = torch.tensor(latents, device=fit.mean_F.device)
    base_SD, tuned_SD = fit.writes_FE[index].float().chunk(2, 1)
    mean_S = fit.mean_F[index].float()

    def treatment(acts_BTD: Tensor) -> Tensor:
        latents_NS = seen.encode(acts_BTD.flatten(0, 1))[:, index] - mean_S
        return acts_BTD + (latents_NS @ (tuned_SD - base_SD)).view_as(acts_BTD)

    return treatment
