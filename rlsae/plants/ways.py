"""The ways to tag: the test of write changes, and what is often used instead. Shapes: F latents, D channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlsae.comparison.changes import PairChange, pair_change
from rlsae.comparison.kinds import CHANGED, UNTESTED
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.matching import match
from rlsae.comparison.members import ROLES, other_role
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.replication import replicated
from rlsae.comparison.similarities import part_columns
from rlsae.comparison.tags import FALSE_DISCOVERY_RATE, benjamini_hochberg
from rlsae.plants.training import Trained
from rlsae.sae.dictionary import SparseAutoencoder

SAME_COSINE, SAME_SCALE_ERROR = 0.7, 0.5
"""From which a latent counts as unchanged where cosines, or latent scaling, decide."""
SHARED_NORM, LIKE_NORM, LIKE_COSINE = 0.2, 0.1, 0.9
"""Distance from ½ up to which the norm ratio of a crosscoder's latent is that of a shared one, and with its cosine, of a like
one."""
TEST, REPLICATED = "write change", "write change, replicated"
SCALE = f"scale error < {SAME_SCALE_ERROR}"
PAIR_WAYS = (f"decoder cosine < {SAME_COSINE}", "below the floor of seeds", SCALE)
CROSSCODER_WAYS = ("norm ratio outside 0.3–0.7", "part cosine < 0.9 or norm ratio outside 0.4–0.6", SCALE)
STAGEWISE_WAY = f"cosine < {SAME_COSINE} on both paths"

Tags = dict[str, NDArray[np.str_]]
"""One of `rlsae.comparison.kinds.TAGS` or "changed" per latent, by role."""


@dataclass(frozen=True)
class Tagged:
    """Latents with their tags by every way."""

    ways: dict[str, pd.DataFrame]
    """`role tag` of each latent, base's first; a latent of a dictionary of both has the role in which it writes more."""
    directions: dict[str, NDArray[np.floating]]
    """Unit vectors that these latents write [F, D], by role, in that order."""
    rank: int
    """Of the shared linear map."""


def tag(trained: Trained, rows: PairedRows, where: torch.device) -> Tagged:
    """Tags of the latents of the first seed; the others serve replication and the floor."""
    saes, maps = trained.saes, fit_linear_maps(rows, where)
    seeds = sorted({seed for _, seed in saes})
    roles = sorted({role for role, _ in saes})
    found = {seed: pair_change({role: saes[role, seed] for role in roles}, rows, maps, where) for seed in seeds}
    decoders = {key: sae.directions().cpu().numpy() for key, sae in saes.items()}
    tags = {TEST: {role: found[seeds[0]].columns[role].tag.to_numpy() for role in roles}}
    tags[REPLICATED] = {role: _replicated(role, found, decoders) for role in roles}
    first = {role: saes[role, seeds[0]] for role in roles}
    if roles == ["tuned"]:
        return _of_both(first["tuned"], found[seeds[0]], tags)
    tags |= _pair_ways(found, decoders)
    if trained.model_steps:
        tags = {way: tags[way] for way in (TEST, REPLICATED)} | {STAGEWISE_WAY: _turned(trained, tags[TEST])}
    ways = {
        way: pd.concat([pd.DataFrame({"role": role, "tag": of_way[role]}) for role in ROLES], ignore_index=True)
        for way, of_way in tags.items()
    }
    return Tagged(ways, {role: decoders[role, seeds[0]] for role in ROLES}, found[seeds[0]].levels[0]["rank"])


def _pair_ways(found: dict[int, PairChange], decoders: dict[tuple[str, int], NDArray[np.floating]]) -> dict[str, Tags]:
    """Tags by the match of base and tuned, by its floor between two seeds, and by latent scaling."""
    first, second = sorted(found)[:2]
    testable = {key: ~np.isin(found[key[1]].columns[key[0]].tag, UNTESTED) for key in decoders}

    def matched(own: tuple[str, int], other: tuple[str, int]) -> NDArray[np.floating]:
        """Cosine of each tested latent's partner; -1 where there is none."""
        cosine = match(decoders[own], decoders[other], testable[own], testable[other]).cosine[testable[own]]
        return np.nan_to_num(cosine, nan=-1)

    def tags_of(changed: Callable[[str], NDArray[np.bool_]]) -> Tags:
        return {role: _flagged(testable[role, first], changed(role)) for role in ROLES}

    partner = {role: matched((role, first), (other_role(role), first)) for role in ROLES}
    scale_error = {role: found[first].columns[role].scale_error.to_numpy()[testable[role, first]] for role in ROLES}
    tags = [
        tags_of(lambda role: partner[role] < SAME_COSINE),
        tags_of(lambda role: _below_floor(partner[role], matched((role, first), (role, second)))),
        tags_of(lambda role: scale_error[role] < SAME_SCALE_ERROR),
    ]
    return dict(zip(PAIR_WAYS, tags, strict=True))


def _of_both(sae: SparseAutoencoder, found: PairChange, tags: dict[str, Tags]) -> Tagged:
    """Tags of one dictionary of both models, whose latents count for the model in which they write more."""
    columns = found.columns["tuned"]
    by_way = {way: of_way["tuned"] for way, of_way in tags.items()}
    if sae.reads == "both":
        testable = ~np.isin(columns.tag, UNTESTED)
        parts = part_columns(sae)
        distance, cosine = np.abs(parts["norm_ratio"] - 0.5)[testable], parts["part_cosine"][testable]
        ratio_tag = np.where(parts["norm_ratio"] > 0.5, "added", "removed")
        flags = [
            distance > SHARED_NORM,
            (cosine < LIKE_COSINE) | (distance > LIKE_NORM),
            columns.scale_error.to_numpy()[testable] < SAME_SCALE_ERROR,
        ]
        by_way |= {way: _flagged(testable, flag) for way, flag in zip(CROSSCODER_WAYS, flags, strict=True)}
        of_norm = by_way[CROSSCODER_WAYS[0]]
        by_way[CROSSCODER_WAYS[0]] = np.where(of_norm == "changed", ratio_tag, of_norm)
    order = np.concatenate([np.flatnonzero(columns.own == role) for role in ROLES])
    ways = {way: pd.DataFrame({"role": columns.own, "tag": tag}).iloc[order] for way, tag in by_way.items()}
    directions = {}
    for role, part_FD in sae.parts().items():
        unit_FD = torch.nn.functional.normalize(part_FD, dim=1).cpu().numpy()
        directions[role] = unit_FD[(columns.own == role).to_numpy()]
    return Tagged(ways, directions, found.levels[0]["rank"])


def _turned(trained: Trained, tested: Tags) -> Tags:
    """Latents that turn when the model changes, whichever comes first of the new data and the new model."""
    steps = [torch.nn.functional.cosine_similarity(before.W_dec_FD, after.W_dec_FD) for before, after in trained.model_steps]
    turned_F = (torch.stack(steps).amax(0) < SAME_COSINE).cpu().numpy()
    testable = {role: ~np.isin(tags, UNTESTED) for role, tags in tested.items()}
    return {role: _flagged(of_role, turned_F[of_role]) for role, of_role in testable.items()}


def _flagged(testable: NDArray[np.bool_], changed: NDArray[np.bool_]) -> NDArray[np.str_]:
    """Tags from whether each tested latent changed."""
    tags = np.full(len(testable), "untestable", dtype=object)
    tags[testable] = np.where(changed, "changed", "unchanged")
    return tags


def _replicated(
    role: str, found: dict[int, PairChange], decoders: dict[tuple[str, int], NDArray[np.floating]]
) -> NDArray[np.str_]:
    """Tags of the first seed that recur in another one; the others count as unchanged."""
    tags = {seed: change.columns[role].tag.to_numpy() for seed, change in found.items()}
    recurs = replicated(tags, {seed: decoders[role, seed] for seed in found})
    first = min(found)
    lost = np.isin(tags[first], CHANGED) & ~recurs[first].fillna(value=False).to_numpy(bool)
    return np.where(lost, "unchanged", tags[first])


def _below_floor(cosine_F: NDArray[np.floating], floor_F: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether a match is worse than those between two seeds of one model, at the false discovery rate of the test."""
    p = (1 + np.searchsorted(np.sort(floor_F), cosine_F, side="right")) / (1 + len(floor_F))
    return benjamini_hochberg(p) <= FALSE_DISCOVERY_RATE
