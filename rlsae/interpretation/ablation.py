"""Do the tagged latents carry the behaviour? Ablate them while the tuned model writes, and see how much reward is lost.

    x' = x - Σ_{i in S} f_i(x) W_dec,i

What the dictionary does not explain stays in x, so an empty set S leaves the model as it is. Each set meets the same prompts
and sampling seeds; beside the tagged latents stand random sets of as many untagged ones, each about as dense as the one that
it stands for. Shapes: R responses, T positions, D channels, N prompts, S sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.comparison.kinds import CHANGED
from rlsae.models import Hook, replace_output
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.statistics import bootstrap_ci95
from rlsae.tuning.held_out import HeldOutPrompts

PROMPTS = 128
NEAREST = 10
"""Untagged latents of the nearest density among which a random set draws."""
COLUMNS = [
    "layer", "dictionary", "seed", "latents", "reward", "reward_change", "ci_low", "ci_high", "random_change", "random_low",
    "random_high", "random_quantile", "density", "random_density",
]  # fmt: skip


def without(sae: SparseAutoencoder, latents: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A module's output acts_RTD without what these latents write."""
    chosen = torch.tensor(latents, dtype=torch.int64, device=sae.W_dec_FD.device)

    def ablated(acts_RTD: Tensor) -> Tensor:
        if not len(chosen):
            return acts_RTD
        latents_BF = sae.encode(acts_RTD.flatten(0, 1))
        return acts_RTD - (latents_BF[:, chosen] @ sae.W_dec_FD[chosen]).view_as(acts_RTD)

    return ablated


@torch.inference_mode()
def rewards_without(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    layer: int,
    hook: Hook,
    sets: Sequence[Sequence[int]],
    prompts: HeldOutPrompts,
) -> NDArray[np.float64]:
    """Reward of a response to each prompt with each set of latents ablated [S, N]."""
    found = []
    for latents in sets:
        with replace_output(model, layer, hook, without(sae, latents)):
            found.append(prompts.rewards(model))
    return np.stack(found)


def matched_sets(table: pd.DataFrame, count: int, seed: int = 0) -> list[list[int]]:
    """Random sets of unchanged latents, for every tagged one a latent of about its density, each at most once.

    Args:
        table: `latent tag density` of one dictionary.
    """
    rng = np.random.default_rng(seed)
    tagged, free = table[table.tag.isin(CHANGED)], table[table.tag == "unchanged"]
    distance = np.abs(np.log(tagged.density.to_numpy())[:, None] - np.log(free.density.to_numpy()))
    sets = []
    for _ in range(count):
        left, drawn = np.ones(len(free), bool), []
        for row in rng.permutation(len(tagged)):
            if not left.any():
                break
            nearest = np.flatnonzero(left)[np.argsort(distance[row, left], kind="stable")[:NEAREST]]
            chosen = rng.choice(nearest)
            left[chosen] = False
            drawn.append(int(free.latent.iloc[chosen]))
        sets.append(drawn)
    return sets


def ablation(
    table: pd.DataFrame,
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    hook: Hook,
    prompts: HeldOutPrompts,
    random_sets: int,
) -> dict[str, Any]:
    """A row of `COLUMNS` for one dictionary of the tuned model.

    Args:
        table: its rows of the comparison's `latents.parquet`, of which some are tagged.

    `random_quantile` is the share of the random sets that lose less reward than the tagged latents; ties count half.
    """
    tagged = table[table.tag.isin(CHANGED)]
    controls = matched_sets(table, random_sets)
    layer = int(table.layer.iloc[0])
    rewards_SN = rewards_without(model, sae, layer, hook, [[], tagged.latent.tolist(), *controls], prompts)
    change_SN = rewards_SN[1:] - rewards_SN[0]
    change, *random_changes = change_SN.mean(1)
    low, high = bootstrap_ci95(change_SN[0])
    density = table.set_index("latent").density
    return {
        "layer": layer,
        "dictionary": table.dictionary.iloc[0],
        "seed": int(table.seed.iloc[0]),
        "latents": len(tagged),
        "reward": rewards_SN[0].mean(),
        "reward_change": change,
        "ci_low": low,
        "ci_high": high,
        "random_change": np.mean(random_changes),
        "random_low": np.quantile(random_changes, 0.025),
        "random_high": np.quantile(random_changes, 0.975),
        "random_quantile": np.mean([(other > change) + 0.5 * (other == change) for other in random_changes]),
        "density": density[tagged.latent].sum(),
        "random_density": np.mean([density[latents].sum() for latents in controls]),
    }
