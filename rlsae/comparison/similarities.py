"""How alike the dictionaries of base and tuned look: mean max cosine similarity (MMCS) and matched latents.

Description beside the test of `write_change`; none of it decides what changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlsae.comparison.matching import Matching, match, match_nearest, mmcs, percentile
from rlsae.comparison.members import ROLES, Key, Member, Members
from rlsae.sae.dictionary import SparseAutoencoder

FLOOR_COLUMNS = ["role", "layer", "dictionary", "seed", "other_seed", "latent", "match_latent", "match_cosine_decoder"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Similarities:
    """Of one layer and dictionary."""

    figures: dict[str, Any]
    """Entries of the manifest."""
    aggregates: list[Row]
    """Rows of `aggregates.parquet`."""
    floor: pd.DataFrame
    """Rows of `floor.parquet`."""
    matchings: dict[int, dict[str, Matching]]
    """Partners of the latents, by seed and role; none for a dictionary that reads the rows of both models."""


def similarities(members: Members, layer: int, name: str) -> Similarities:
    """MMCS of base and tuned with equal and unequal seeds, and its floor between the seeds of one model.

    A dictionary that reads the rows of both models has no partner, and only the floor.
    """
    paired, seeds = _seeds(members, "base", layer, name), _seeds(members, "tuned", layer, name)
    same = {s: _matching(members, ("base", layer, name, s), ("tuned", layer, name, s)) for s in paired}
    crossed = [
        _matching(members, ("base", layer, name, a), ("tuned", layer, name, b)) for a, b in itertools.permutations(paired, 2)
    ]
    floors = {
        (role, a, b): _matching(members, (role, layer, name, a), (role, layer, name, b))
        for role in (ROLES if paired else ROLES[1:])
        for a, b in itertools.combinations(seeds, 2)
    }
    figures: dict[str, Any] = {}
    aggregates = []
    measured = {"mmcs_base_tuned": list(same.values()), "mmcs_base_tuned_other_seed": crossed} if paired else {}
    for measure_name, matchings in (measured | {"mmcs_floor": list(floors.values())}).items():
        found, row = _figure(measure_name, matchings, layer=layer, dictionary=name)
        figures |= found
        aggregates.append(row)
    floor = [
        pd.DataFrame(
            {"role": role, "layer": layer, "dictionary": name, "seed": a, "other_seed": b}
            | {"latent": np.arange(len(m.partner)), "match_latent": m.partner, "match_cosine_decoder": m.cosine}
        )
        for (role, a, b), m in floors.items()
    ]
    both = {
        seed: {"base": matching, "tuned": _reverse(matching, len(members["tuned", layer, name, seed].firings))}
        for seed, matching in same.items()
    }
    table = pd.concat(floor or [pd.DataFrame(columns=FLOOR_COLUMNS)], ignore_index=True)
    return Similarities(figures, aggregates, table, both)


def size_similarities(members: Members, layer: int, sizes: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """MMCS of the small dictionary's latents in the big one, within each model (the paper's figure): one-to-one and maximum."""
    figures: dict[str, Any] = {}
    rows = []
    for role in ROLES:
        seeds = _seeds(members, role, layer, sizes["small"])
        pairs = [s for s in seeds if (role, layer, sizes["big"], s) in members]
        for ending, pairing in (("", match), ("_max", match_nearest)):
            matchings = [
                _matching(members, (role, layer, sizes["small"], s), (role, layer, sizes["big"], s), pairing) for s in pairs
            ]
            name = f"mmcs_small_big_{role}{ending}"
            found, row = _figure(name, matchings, layer=layer, dictionary=f"{sizes['small']}→{sizes['big']}")
            figures |= found
            rows.append(row)
    return figures, rows


def part_columns(sae: SparseAutoencoder) -> dict[str, NDArray[Any]]:
    """Columns of `latents.parquet` about the two parts of what each latent of a crosscoder writes: how long the tuned part is
    beside both, and the cosine between them."""
    base_FD, tuned_FD = sae.parts().values()
    cosine_F = torch.nn.functional.cosine_similarity(base_FD, tuned_FD)
    return {"norm_ratio": sae.norm_ratio().cpu().numpy(), "part_cosine": cosine_F.cpu().numpy()}


def match_columns(own: Member, other: Member, matching: Matching, floor: NDArray[np.floating]) -> dict[str, NDArray[Any]]:
    """Columns of `latents.parquet` about the partners of a dictionary's latents.

    Args:
        floor: cosines of partners between two seeds of one model.
    """
    has = matching.partner >= 0
    encoder = np.full(len(has), np.nan)
    encoder[has] = (own.encoder_FD[has] * other.encoder_FD[matching.partner[has]]).sum(1)
    return {
        "match_latent": matching.partner,
        "match_cosine_decoder": matching.cosine,
        "match_cosine_encoder": encoder,
        "floor_percentile": percentile(matching.cosine, floor),
    }


def add_size_matches(table: pd.DataFrame, members: Members, sizes: dict[str, str]) -> pd.DataFrame:
    """Columns `match_size_latent` and `match_size_cosine`: each latent's partner in the dictionary of the other size."""
    table = table.assign(match_size_latent=-1, match_size_cosine=np.nan)
    for key, rows in table.groupby(["role", "layer", "dictionary", "seed"]).groups.items():
        role, layer, name, seed = cast("tuple[str, int, str, int]", key)
        other = {sizes["small"]: sizes["big"], sizes["big"]: sizes["small"]}.get(name)
        if other and (role, layer, other, seed) in members:
            matching = _matching(members, (role, layer, name, seed), (role, layer, other, seed))
            table.loc[rows, "match_size_latent"] = matching.partner
            table.loc[rows, "match_size_cosine"] = matching.cosine
    return table


def _matching(members: Members, own: Key, other: Key, pairing: Callable[..., Matching] = match) -> Matching:
    a, b = members[own], members[other]
    return pairing(a.decoder_FD, b.decoder_FD, a.alive, b.alive)


def _seeds(members: Members, role: str, layer: int, name: str) -> list[int]:
    return sorted(seed for r, n, d, seed in members if (r, n, d) == (role, layer, name))


def _figure(name: str, matchings: list[Matching], **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A figure with its interval: as entries of the manifest, and as a row of `aggregates.parquet`."""
    value, (low, high), count = mmcs(matchings)
    row = {**keys, "measure": name, "value": value, "ci_low": low, "ci_high": high, "latents": count}
    if math.isnan(value):
        return {name: None, f"{name}_ci95": None}, row
    return {name: value, f"{name}_ci95": [low, high]}, row


def _reverse(matching: Matching, latents: int) -> Matching:
    """The same pairs seen from the other dictionary."""
    partner, cosine = np.full(latents, -1), np.full(latents, np.nan)
    has = matching.partner >= 0
    partner[matching.partner[has]] = np.flatnonzero(has)
    cosine[matching.partner[has]] = matching.cosine[has]
    return Matching(partner, cosine)
