"""Stage `comparison`: one table of latents for base and tuned, and the figures that describe how alike they are.

`latents.parquet` has one row per role × layer × dictionary × seed × latent; `aggregates.parquet` the mean max cosine
similarities (MMCS) with intervals; `floor.parquet` the matches between two seeds of one model.
Shapes: B rows, F latents, D channels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore
from rlsae.comparison.matching import Matching, match, mmcs, percentile
from rlsae.compute import device
from rlsae.errors import RlsaeError
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_batches
from rlsae.sae.train import load_members

ROLES = ("base", "tuned")
FLOOR_COLUMNS = ["role", "layer", "dictionary", "seed", "other_seed", "latent", "match_latent", "match_cosine_decoder"]


@dataclass(frozen=True)
class Member:
    """One trained dictionary with what it does on the held-out rows of its own policy."""

    decoder_FD: NDArray[np.float32]
    encoder_FD: NDArray[np.float32]
    firings: NDArray[np.int64]
    density: NDArray[np.float64]
    mean_active: NDArray[np.float64]
    max_active: NDArray[np.float64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        return self.firings > 0


Members = dict[tuple[str, int, str, int], Member]
"""By role, layer, dictionary and seed."""


def build_comparison(
    settings: dict[str, Any],
    out: Path,
    work: Path | None,
    dictionaries: dict[tuple[str, int, str], Path],
    stores: dict[str, Path],
) -> None:
    """Compare the dictionaries of a study.

    Args:
        settings: `dictionaries` and `sizes` of the study.
        dictionaries: artifact by role, layer and dictionary.
        stores: activation artifact by role.
    """
    inputs = {f"{role} layer {layer} {name}": path for (role, layer, name), path in dictionaries.items()}
    inputs |= {f"{role} activations": path for role, path in stores.items()}
    with Stage("comparison", out, settings, inputs, work) as stage:
        members = _measure_all(dictionaries, {role: ActivationStore(path) for role, path in stores.items()})
        layers = sorted({layer for _, layer, _ in dictionaries})
        latents, aggregates, floors = [], [], []
        metrics: dict[str, Any] = {"layers": {}}
        for layer in layers:
            entry: dict[str, Any] = {"dictionaries": {}}
            if settings["sizes"]:
                entry["sizes"], rows = _sizes(members, layer, settings["sizes"])
                aggregates += rows
            for name in settings["dictionaries"]:
                figures, rows, table, floor = _base_tuned(members, layer, name)
                entry["dictionaries"][name] = figures
                aggregates += rows
                latents.append(table)
                floors.append(floor)
            metrics["layers"][str(layer)] = entry
        table = pd.concat(latents, ignore_index=True)
        if settings["sizes"]:
            table = _add_size_matches(table, members, settings["sizes"])
        table.to_parquet(stage.staging / "latents.parquet", index=False)
        pd.DataFrame(aggregates).to_parquet(stage.staging / "aggregates.parquet", index=False)
        pd.concat(floors, ignore_index=True).to_parquet(stage.staging / "floor.parquet", index=False)
        stage.publish(metrics)


def _measure_all(dictionaries: dict[tuple[str, int, str], Path], stores: dict[str, ActivationStore]) -> Members:
    where = device()
    members: Members = {}
    progress = Progress("held-out rows", len(dictionaries), "dictionaries")
    for (role, layer, name), folder in dictionaries.items():
        for seed, path in load_members(folder).items():
            members[role, layer, name, seed] = measure(SparseAutoencoder.load(path).to(where), stores[role], layer, where)
        progress.update()
    for role, layer, name, seed in members:
        if (other := ("tuned" if role == "base" else "base", layer, name, seed)) not in members:
            raise RlsaeError(f"layer {layer}, dictionary {name}: seed {seed} was trained for {role} and not for {other[0]}")
    return members


@torch.inference_mode()
def measure(sae: SparseAutoencoder, store: ActivationStore, layer: int, where: torch.device) -> Member:
    """Firings, density (share of rows) and size of each latent on the held-out rows."""
    firings_F = torch.zeros(sae.latents, dtype=torch.int64, device=where)
    total_F = torch.zeros(sae.latents, dtype=torch.float64, device=where)
    largest_F = torch.zeros(sae.latents, device=where)
    rows = 0
    for _, acts_BD in held_out_batches(store, layer, where):
        latents_BF = sae.encode(acts_BD)
        firings_F += (latents_BF > 0).sum(0)
        total_F += latents_BF.double().sum(0)
        largest_F = torch.maximum(largest_F, latents_BF.max(0).values)
        rows += len(acts_BD)
    firings = firings_F.cpu().numpy()
    return Member(
        decoder_FD=sae.directions().cpu().numpy(),
        encoder_FD=torch.nn.functional.normalize(sae.W_enc_DF.T, dim=1).cpu().numpy(),
        firings=firings,
        density=firings / rows,
        mean_active=(total_F.cpu().numpy() / np.maximum(firings, 1)),
        max_active=largest_F.double().cpu().numpy(),
    )


def _matching(members: Members, own: tuple[str, int, str, int], other: tuple[str, int, str, int]) -> Matching:
    a, b = members[own], members[other]
    return match(a.decoder_FD, b.decoder_FD, a.alive, b.alive)


def _seeds(members: Members, role: str, layer: int, name: str) -> list[int]:
    return sorted(seed for r, n, d, seed in members if (r, n, d) == (role, layer, name))


def _figure(name: str, matchings: list[Matching], **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A figure with its interval: as entries of the manifest, and as a row of `aggregates.parquet`."""
    value, (low, high), count = mmcs(matchings)
    row = {**keys, "measure": name, "value": value, "ci_low": low, "ci_high": high, "latents": count}
    if math.isnan(value):
        return {name: None, f"{name}_ci95": None}, row
    return {name: value, f"{name}_ci95": [low, high]}, row


def _sizes(members: Members, layer: int, sizes: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """MMCS of the small dictionary's latents in the big one, within each model (the paper's figure)."""
    figures: dict[str, Any] = {}
    rows = []
    for role in ROLES:
        seeds = _seeds(members, role, layer, sizes["small"])
        pairs = [s for s in seeds if (role, layer, sizes["big"], s) in members]
        matchings = [_matching(members, (role, layer, sizes["small"], s), (role, layer, sizes["big"], s)) for s in pairs]
        found, row = _figure(f"mmcs_small_big_{role}", matchings, layer=layer, dictionary=f"{sizes['small']}→{sizes['big']}")
        figures |= found
        rows.append(row)
    return figures, rows


def _base_tuned(
    members: Members, layer: int, name: str
) -> tuple[dict[str, Any], list[dict[str, Any]], pd.DataFrame, pd.DataFrame]:
    """Figures, aggregate rows, latent rows and floor rows of one layer and dictionary."""
    seeds = _seeds(members, "base", layer, name)
    same = {s: _matching(members, ("base", layer, name, s), ("tuned", layer, name, s)) for s in seeds}
    crossed = [
        _matching(members, ("base", layer, name, a), ("tuned", layer, name, b)) for a, b in itertools.permutations(seeds, 2)
    ]
    floors = {
        (role, a, b): _matching(members, (role, layer, name, a), (role, layer, name, b))
        for role in ROLES
        for a, b in itertools.combinations(seeds, 2)
    }
    figures: dict[str, Any] = {}
    rows = []
    for measure_name, matchings in [
        ("mmcs_base_tuned", list(same.values())),
        ("mmcs_base_tuned_other_seed", crossed),
        ("mmcs_floor", list(floors.values())),
    ]:
        found, row = _figure(measure_name, matchings, layer=layer, dictionary=name)
        figures |= found
        rows.append(row)

    floor_cosines = np.concatenate([m.cosine for m in floors.values()]) if floors else np.empty(0)
    tables = []
    for seed, forward in same.items():
        backward = _reverse(forward, len(members["tuned", layer, name, seed].firings))
        for role, matching in (("base", forward), ("tuned", backward)):
            own = members[role, layer, name, seed]
            other = members["tuned" if role == "base" else "base", layer, name, seed]
            tables.append(_latent_rows(own, other, matching, floor_cosines, role, layer, name, seed))
    floor_table = pd.concat(
        [
            pd.DataFrame(
                {"role": role, "layer": layer, "dictionary": name, "seed": a, "other_seed": b}
                | {"latent": np.arange(len(m.partner)), "match_latent": m.partner, "match_cosine_decoder": m.cosine}
            )
            for (role, a, b), m in floors.items()
        ]
        or [pd.DataFrame(columns=FLOOR_COLUMNS)],
        ignore_index=True,
    )
    return figures, rows, pd.concat(tables, ignore_index=True), floor_table


def _reverse(matching: Matching, latents: int) -> Matching:
    """The same pairs seen from the other dictionary."""
    partner, cosine = np.full(latents, -1), np.full(latents, np.nan)
    has = matching.partner >= 0
    partner[matching.partner[has]] = np.flatnonzero(has)
    cosine[matching.partner[has]] = matching.cosine[has]
    return Matching(partner, cosine)


def _latent_rows(
    own: Member,
    other: Member,
    matching: Matching,
    floor: NDArray[np.floating],
    role: str,
    layer: int,
    name: str,
    seed: int,
) -> pd.DataFrame:
    has = matching.partner >= 0
    encoder = np.full(len(has), np.nan)
    encoder[has] = (own.encoder_FD[has] * other.encoder_FD[matching.partner[has]]).sum(1)
    return pd.DataFrame(
        {
            "role": role,
            "layer": layer,
            "dictionary": name,
            "seed": seed,
            "latent": np.arange(len(has)),
            "firings": own.firings,
            "density": own.density,
            "mean_active": own.mean_active,
            "max_active": own.max_active,
            "match_latent": matching.partner,
            "match_cosine_decoder": matching.cosine,
            "match_cosine_encoder": encoder,
            "floor_percentile": percentile(matching.cosine, floor),
        }
    )


def _add_size_matches(table: pd.DataFrame, members: Members, sizes: dict[str, str]) -> pd.DataFrame:
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
