"""One trial: plant known changes, train the dictionaries of base and tuned, tag in several ways, and count what is right.

The test of write changes stands beside what is often used instead. Shapes: F latents, D channels.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, canonical_json
from rlsae.comparison.changes import PairChange, pair_change
from rlsae.comparison.kinds import CHANGED, UNTESTED
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.matching import match
from rlsae.comparison.members import ROLES, other_role
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.replication import replicated
from rlsae.comparison.tags import FALSE_DISCOVERY_RATE, benjamini_hochberg
from rlsae.compute import device
from rlsae.config import AnyDictionary
from rlsae.expand import parse_settings
from rlsae.plants.plant import Plant, read_truth, write_plant
from rlsae.plants.score import score
from rlsae.plants.trials import NULL, RECIPES, SHARED, VARIATIONS, Trial
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import ROW_ORDER_SEED, centre_and_scale, new_members, train

SAME_COSINE, SAME_SCALE_ERROR = 0.7, 0.5
"""From which a latent counts as unchanged where cosines, or latent scaling, decide."""
WAYS = (
    "write change",
    "write change, replicated",
    "decoder cosine < 0.7",
    "below the floor of seeds",
    "scale error < 0.5",
)
SCORES, DIRECTIONS = "scores.parquet", "directions.parquet"

Tags = dict[str, NDArray[np.str_]]
"""One of `rlsae.comparison.kinds.TAGS` or "changed" per latent, by role."""
ByRoleAndSeed = dict[tuple[str, int], SparseAutoencoder]


def run_trial(trial: Trial, out: Path, work: Path | None) -> None:
    """Write `scores.parquet`, one row per way to tag, and `directions.parquet`, the truth with what each way found."""
    with Stage("plants", out, asdict(trial), {}, work) as stage:
        where = device()
        folder = stage.work / "plant"
        if not (folder / "activations" / "tuned" / MANIFEST).exists():
            plant = Plant(trial.seed, documents=trial.documents, **VARIATIONS[trial.variation.removeprefix(NULL)])
            write_plant(plant.without_changes() if trial.variation.startswith(NULL) else plant, folder)
        stores = {role: ActivationStore(folder / "activations" / role) for role in ROLES}
        recipe = {"architecture": trial.architecture} | SHARED | RECIPES[trial.architecture]
        saes = {(role, seed): sae for role in ROLES for seed, sae in _train(recipe, stores[role], where).items()}
        truth, seed = read_truth(folder), SHARED["seeds"][0]
        decoders = {role: saes[role, seed].directions().cpu().numpy() for role in ROLES}
        ways, rank = tag(saes, PairedRows(stores["base"], stores["tuned"], 0), where)
        scores, directions = [], []
        for way, tags in ways.items():
            latents = pd.concat([pd.DataFrame({"role": role, "tag": tags[role]}) for role in ROLES], ignore_index=True)
            found, table = score(truth, latents, decoders)
            scores.append({**asdict(trial), "way": way, **asdict(found), "rank": rank})
            if not way.startswith("write change"):
                scores[-1]["kind_accuracy"] = float("nan")  # it tells no kinds
            directions.append(table.assign(**asdict(trial), way=way))
        pd.DataFrame(scores).to_parquet(stage.staging / SCORES, index=False)
        pd.concat(directions).to_parquet(stage.staging / DIRECTIONS, index=False)
        stage.details["device"] = str(where)
        stage.publish({entry["way"]: {key: _number(entry[key]) for key in asdict(found)} for entry in scores})


def _train(recipe: dict[str, Any], store: ActivationStore, where: torch.device) -> dict[int, SparseAutoencoder]:
    """Dictionaries of a plant's rows by seed, trained as the stage trains them."""
    entry = parse_settings(AnyDictionary, canonical_json(recipe))
    order = store.row_order(0, entry.batch_rows, ROW_ORDER_SEED, entry.epochs)
    mean_D, scale = centre_and_scale(store, 0, entry, where)
    members = new_members(entry, order.shape[1], store.group.attrs["policy"], where)
    with Stage("dictionaries", store.path.parent / "dictionary", recipe, {}) as stage:
        train(members, order, entry, mean_D, scale, stage)
    return {seed: member.export().reading_raw_rows(mean_D, scale) for seed, member in members.items()}


def tag(saes: ByRoleAndSeed, rows: PairedRows, where: torch.device) -> tuple[dict[str, Tags], int]:
    """
    Args:
        saes: by role and seed; those of the first seed are tagged, the others serve replication and the floor.

    Returns:
        the tags by way, and the rank of the shared linear map.
    """
    seeds = sorted({seed for _, seed in saes})
    maps = fit_linear_maps(rows, where)
    pairs = {seed: pair_change({role: saes[role, seed] for role in ROLES}, rows, maps, where) for seed in seeds}
    first, second = seeds[:2]
    decoders = {key: sae.directions().cpu().numpy() for key, sae in saes.items()}
    testable = {(role, seed): ~np.isin(pair.columns[role].tag, UNTESTED) for seed, pair in pairs.items() for role in ROLES}

    def matched(own: tuple[str, int], other: tuple[str, int]) -> NDArray[np.floating]:
        """Cosine of each tested latent's partner; -1 where there is none."""
        cosine = match(decoders[own], decoders[other], testable[own], testable[other]).cosine[testable[own]]
        return np.nan_to_num(cosine, nan=-1)

    def tags_of(changed: dict[str, NDArray[np.bool_]]) -> Tags:
        """Tags from whether each tested latent changed."""
        tags = {role: np.full(len(testable[role, first]), "untestable", dtype=object) for role in ROLES}
        for role in ROLES:
            tags[role][testable[role, first]] = np.where(changed[role], "changed", "unchanged")
        return tags

    scale_error = {role: pairs[first].columns[role].scale_error.to_numpy()[testable[role, first]] for role in ROLES}
    partner = {role: matched((role, first), (other_role(role), first)) for role in ROLES}
    floor = {role: matched((role, first), (role, second)) for role in ROLES}
    tags = [
        {role: pairs[first].columns[role].tag.to_numpy() for role in ROLES},
        {role: _replicated(role, pairs, decoders) for role in ROLES},
        tags_of({role: partner[role] < SAME_COSINE for role in ROLES}),
        tags_of({role: _below_floor(partner[role], floor[role]) for role in ROLES}),
        tags_of({role: scale_error[role] < SAME_SCALE_ERROR for role in ROLES}),
    ]
    return dict(zip(WAYS, tags, strict=True)), pairs[first].levels[0]["rank"]


def _replicated(
    role: str, pairs: dict[int, PairChange], decoders: dict[tuple[str, int], NDArray[np.floating]]
) -> NDArray[np.str_]:
    """Tags of the first seed that recur in another one; the others count as unchanged."""
    tags = {seed: pair.columns[role].tag.to_numpy() for seed, pair in pairs.items()}
    recurs = replicated(tags, {seed: decoders[role, seed] for seed in pairs})
    first = min(pairs)
    lost = np.isin(tags[first], CHANGED) & ~recurs[first].fillna(value=False).to_numpy(bool)
    return np.where(lost, "unchanged", tags[first])


def _below_floor(cosine_F: NDArray[np.floating], floor_F: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether a match is worse than those between two seeds of one model, at the false discovery rate of the test."""
    p = (1 + np.searchsorted(np.sort(floor_F), cosine_F, side="right")) / (1 + len(floor_F))
    return benjamini_hochberg(p) <= FALSE_DISCOVERY_RATE


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
