"""The dictionaries of a trial, trained as the stage trains them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlsae.activations.joint import rows_of
from rlsae.activations.store import ActivationStore
from rlsae.artifacts import canonical_json
from rlsae.comparison.members import ROLES
from rlsae.config import AnyDictionary
from rlsae.expand import parse_settings
from rlsae.plants.trials import EPOCHS, RECIPES, SHARED, STAGEWISE
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import ROW_ORDER_SEED, centre_and_scale, new_members, train

Members = dict[int, SparseAutoencoder]
"""By seed."""


@dataclass(frozen=True)
class Trained:
    """What looks at a plant."""

    saes: dict[tuple[str, int], SparseAutoencoder]
    """By role and seed; of tuned alone where they read the rows of both."""
    model_steps: list[tuple[SparseAutoencoder, SparseAutoencoder]] = field(default_factory=list)
    """Of stage-wise dictionaries of the first seed: before and after the step from base to tuned, on either path."""


def train_method(method: str, stores: dict[str, ActivationStore], old: dict[str, ActivationStore], work: Path) -> Trained:
    """
    Args:
        stores: rows of base and tuned, by role; old: of other documents, on which stage-wise dictionaries begin.
        work: folder for partial states.
    """
    recipe = SHARED | RECIPES[method]
    if method == STAGEWISE:
        return _stagewise(recipe, stores, old, work)
    roles = ROLES if recipe.get("reads", "own") == "own" else ("tuned",)
    found = {role: train_recipe(recipe, EPOCHS, role, stores, None, work) for role in roles}
    return Trained({(role, seed): sae for role, members in found.items() for seed, sae in members.items()})


def _stagewise(
    recipe: dict[str, Any], stores: dict[str, ActivationStore], old: dict[str, ActivationStore], work: Path
) -> Trained:
    """S on (base, old data), then by new data first, S → D (base) → F (tuned), or by the new model first, S → M (tuned, old
    data) → F' (Bricken et al. 2024, "Stage-wise model diffing"). The pair that is compared is D and F."""
    first = train_recipe(recipe, EPOCHS // 2, "base", old, None, work)
    new_data = train_recipe(recipe, EPOCHS // 4, "base", stores, first, work)
    finished = train_recipe(recipe, EPOCHS // 4, "tuned", stores, new_data, work)
    new_model = train_recipe(recipe, EPOCHS // 4, "tuned", old, first, work)
    seed = SHARED["seeds"][0]
    saes = {("base", seed): sae for seed, sae in new_data.items()} | {("tuned", seed): sae for seed, sae in finished.items()}
    return Trained(saes, [(new_data[seed], finished[seed]), (first[seed], new_model[seed])])


def train_recipe(
    recipe: dict[str, Any], epochs: int, role: str, stores: dict[str, ActivationStore], start: Members | None, work: Path
) -> Members:
    """Dictionaries of a plant's rows, from the start or going on from others."""
    entry = parse_settings(AnyDictionary, canonical_json(recipe | {"epochs": epochs}))
    store = rows_of(entry.reads, role, stores)
    order = store.row_order(0, entry.batch_rows, ROW_ORDER_SEED, entry.epochs)
    mean_D, scale = centre_and_scale(store, 0, entry, torch.device("cpu"))
    members = new_members(entry, order.shape[1], store.group.attrs["policy"], mean_D.device)
    with torch.no_grad():
        for seed, sae in (start or {}).items():
            scale = sae.metadata["rlsae"]["scale"]
            members[seed].load(sae.reading_normalised_rows(mean_D, scale))
    with Stage("dictionaries", work / "dictionary", recipe, {}) as stage:
        train(members, order, entry, mean_D, scale, stage)
    metadata = {"rlsae": {"reads": entry.reads, "scale": scale}}
    return {seed: member.export().reading_raw_rows(mean_D, scale, metadata) for seed, member in members.items()}
