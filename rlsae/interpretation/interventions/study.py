"""All interventions of a study: ablations in both models, dose and response, transplants from the tuned model to the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from rlsae.beside import AnySae, at_model
from rlsae.comparison.kinds import CHANGED
from rlsae.comparison.linear_map import LinearMaps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.config.studies import Interventions
from rlsae.interpretation.interventions import ablation, carried, steering, transplant
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.interpretation.interventions.effects import Place, rewards
from rlsae.models import Hook
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.tuning.fixed_prompts import FixedPrompts

SINGLE = ["role", "layer", "dictionary", "seed", "latent", "ablation_reward_change"]


@dataclass(frozen=True)
class Member:
    """One dictionary of the study, on the device, with its latents."""

    role: str
    layer: int
    name: str
    seed: int
    sae: SparseAutoencoder
    table: pd.DataFrame
    """Its rows of the comparison's `latents.parquet`, with `reward_correlation`."""
    explained: list[int]

    @property
    def label(self) -> str:
        return f"{self.role} layer {self.layer} {self.name}"


@dataclass(frozen=True)
class Tables:
    """See `COLUMNS` of each module."""

    ablations: pd.DataFrame
    steering: pd.DataFrame
    transplants: pd.DataFrame
    carried: pd.DataFrame
    single: pd.DataFrame
    """Change of the reward when an explained latent of the tuned model is ablated alone."""

    @classmethod
    def of(cls, *rows: list[dict[str, Any]]) -> Tables:
        columns = ablation.COLUMNS, steering.COLUMNS, transplant.COLUMNS, carried.COLUMNS, SINGLE
        return cls(*(pd.DataFrame(of_table, columns=names) for of_table, names in zip(rows, columns, strict=True)))

    @classmethod
    def empty(cls) -> Tables:
        return cls.of([], [], [], [], [])


def intervene(
    entry: Interventions,
    members: list[Member],
    models: dict[str, PreTrainedModel],
    hook: Hook,
    rows: dict[int, PairedRows],
    maps: dict[int, tuple[LinearMaps, int]],
    prompts: FixedPrompts,
    where: torch.device,
    stage: Stage,
) -> Tables:
    """Tables of all dictionaries; those that an earlier, unfinished run has done are taken from its partial state.

    Args:
        models: base and tuned, by role.
        maps: by layer, with the rank that the layer's latents share.
    """
    _, done = stage.load_state() or ({}, {})
    progress = Progress("intervene", len(members), "dictionaries", done=len(done))
    for member in members:
        if member.label in done:
            continue
        layer_maps, rank = maps[member.layer]
        found = _interventions(entry, member, models, hook, rows[member.layer], layer_maps, rank, prompts, where)
        done[member.label] = [pd.DataFrame(of_table).to_dict("records") for of_table in found]
        stage.save_state({}, done)
        progress.update()
    by_table = zip(*(done[member.label] for member in members), strict=True)
    return Tables.of(*([row for of_member in of_table for row in of_member] for of_table in by_table))


def _interventions(
    entry: Interventions,
    member: Member,
    models: dict[str, PreTrainedModel],
    hook: Hook,
    rows: PairedRows,
    maps: LinearMaps,
    rank: int,
    prompts: FixedPrompts,
    where: torch.device,
) -> list[list[dict[str, Any]]]:
    """Rows of each of `Tables` for one dictionary."""
    place = Place(models[member.role], member.layer, hook)
    key = {"layer": member.layer, "dictionary": member.name, "seed": member.seed}
    sets = ablation.sets_of(member.table, entry.latents)
    moved, carry, single = [], [], []
    with at_model(member.sae, member.role, member.role, models, member.layer, hook) as sae:
        ablated = ablation.ablations(member.table, member.role, place, sae, prompts, sets, entry.random_sets)
        of_policy = {"policy": member.role} | key
        steered = steering.dose_response(of_policy, place, sae, prompts, models["base"], sets, entry.gains)
        if member.role == "tuned":
            single = one_by_one(member, place, sae, prompts)
    if member.role == "base":
        change = transplant.Change.estimate(member.sae, rows, maps, rank, where)
        tagged = member.table.latent[member.table.tag.isin(CHANGED)].tolist()
        moved = transplant.transplants(key, place, models["tuned"], change, tagged, prompts)
    else:
        carry = carried.carried(key, member.sae, sets, models, hook, rows, maps, prompts)
    return [ablated, steered, moved, carry, single]


def one_by_one(member: Member, place: Place, sae: AnySae, prompts: FixedPrompts) -> list[dict[str, Any]]:
    """Ablate each explained latent alone."""
    edits = [Edit(), *(Edit((latent,)) for latent in member.explained)]
    reward_E = rewards(place, lambda some: edited(sae, edits[some]), len(edits), prompts).mean(1)
    key = (member.role, member.layer, member.name, member.seed)
    changes = np.subtract(reward_E[1:], reward_E[0])
    return [
        dict(zip(SINGLE, (*key, latent, change), strict=True)) for latent, change in zip(member.explained, changes, strict=True)
    ]
