"""Do latents carry the behaviour? Ablate them while the model writes, and see how much reward is lost.

Beside a set of latents stand random sets of as many others, each latent about as dense as the one that it stands for: any
ablation disturbs a model, and a dense latent's more. Shapes: S sets, N prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rlsae.beside import AnySae
from rlsae.comparison.kinds import CHANGED, UNTESTED
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.interpretation.interventions.effects import Place, rewards
from rlsae.statistics import bootstrap_ci95
from rlsae.tuning.fixed_prompts import FixedPrompts

NEAREST = 10
"""Other latents of the nearest density among which a random set draws."""
COLUMNS = [
    "policy", "layer", "dictionary", "seed", "set", "latents", "reward", "reward_change", "ci_low", "ci_high", "random_change",
    "random_low", "random_high", "random_quantile", "density", "random_density",
]  # fmt: skip


def sets_of(table: pd.DataFrame, count: int) -> dict[str, list[int]]:
    """Latents of one dictionary to intervene on, by set: `tagged` and `reward`; a set without latents is left out.

    Args:
        table: `latent tag reward_gradient` of the dictionary.
        count: latents of `reward`, those with the largest gradient of the reward on training prompts.
    """
    tested = table[~table.tag.isin(UNTESTED)]
    rising = tested[tested.reward_gradient > 0].sort_values("reward_gradient", ascending=False, kind="stable")
    sets = {"tagged": table.latent[table.tag.isin(CHANGED)].tolist(), "reward": rising.latent.head(count).tolist()}
    return {name: latents for name, latents in sets.items() if latents}


def matched_sets(table: pd.DataFrame, chosen: list[int], count: int, seed: int = 0) -> list[list[int]]:
    """Random sets of other, unchanged latents: for every chosen one a latent of about its density, each at most once.

    Args:
        table: `latent tag density` of one dictionary.
    """
    rng = np.random.default_rng(seed)
    density = table.set_index("latent").density
    free = table[(table.tag == "unchanged") & ~table.latent.isin(chosen)]
    distance = np.abs(np.log(density[chosen].to_numpy())[:, None] - np.log(free.density.to_numpy()))
    sets = []
    for _ in range(count):
        left, drawn = np.ones(len(free), bool), []
        for row in rng.permutation(len(chosen)):
            if not left.any():
                break
            nearest = np.flatnonzero(left)[np.argsort(distance[row, left], kind="stable")[:NEAREST]]
            taken = rng.choice(nearest)
            left[taken] = False
            drawn.append(int(free.latent.iloc[taken]))
        sets.append(drawn)
    return sets


def ablations(
    table: pd.DataFrame,
    policy: str,
    place: Place,
    sae: AnySae,
    prompts: FixedPrompts,
    sets: dict[str, list[int]],
    random_sets: int,
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each set of one dictionary's latents.

    Args:
        table: the dictionary's rows of the comparison's `latents.parquet`.
        policy: which of the two models `place` is.

    `random_quantile` is the share of the random sets that lose less reward than the set does; ties count half.
    """
    controls = {name: matched_sets(table, latents, random_sets) for name, latents in sets.items()}
    edits = [Edit(), *(Edit(tuple(latents)) for name in sets for latents in [sets[name], *controls[name]])]
    rewards_SN = rewards(place, lambda some: edited(sae, edits[some]), len(edits), prompts)
    change_SN = rewards_SN[1:] - rewards_SN[0]
    density = table.set_index("latent").density
    rows = []
    for (name, latents), of_set_SN in zip(sets.items(), np.split(change_SN, len(sets)), strict=True):
        change, *random_changes = of_set_SN.mean(1)
        low, high = bootstrap_ci95(of_set_SN[0])
        rows.append(
            {
                "policy": policy,
                "layer": place.layer,
                "dictionary": table.dictionary.iloc[0],
                "seed": int(table.seed.iloc[0]),
                "set": name,
                "latents": len(latents),
                "reward": rewards_SN[0].mean(),
                "reward_change": change,
                "ci_low": low,
                "ci_high": high,
                "random_change": np.mean(random_changes),
                "random_low": np.quantile(random_changes, 0.025),
                "random_high": np.quantile(random_changes, 0.975),
                "random_quantile": np.mean([(other > change) + 0.5 * (other == change) for other in random_changes]),
                "density": density[latents].sum(),
                "random_density": np.mean([density[control].sum() for control in controls[name]]),
            }
        )
    return rows
