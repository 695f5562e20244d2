"""Stage `comparison`: which latents changed between base and tuned, and figures that describe how alike they are.

`latents.parquet` has one row per role × layer × dictionary × seed × latent; `levels.parquet` says how much of the difference
a shift of the mean, a linear map and the latents hold, and how well each dictionary does with either policy;
`aggregates.parquet` has these scores and the mean max cosine similarities (MMCS) with intervals; `floor.parquet` the matches
between two seeds of one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import Manifest
from rlsae.comparison.agreement import agreement
from rlsae.comparison.changes import pair_change, tag_counts
from rlsae.comparison.linear_map import LinearMaps, fit_linear_maps
from rlsae.comparison.members import ROLES, Key, Members, measure_all, other_role
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.replication import replicated
from rlsae.comparison.similarities import (
    Similarities,
    add_size_matches,
    match_columns,
    part_columns,
    similarities,
    size_similarities,
)
from rlsae.comparison.transfer import KEY, SCORES, transfer
from rlsae.compute import device
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members

COLUMNS = """role layer dictionary seed latent firings density mean_active max_active
    own write_change write_change_raw write_ratio write_angle p q tag replicated
    match_latent match_cosine_decoder match_cosine_encoder match_jaccard match_pearson match_size_latent match_size_cosine
    floor_percentile scale_error density_shift norm_ratio part_cosine
    model_step_cosine""".split()
WITHOUT_PARTNER = {"match_latent": -1, "match_size_latent": -1}
"""Where there is no partner, or nothing to match."""


def build_comparison(
    settings: dict[str, Any],
    out: Path,
    work: Path | None,
    dictionaries: dict[tuple[str, int, str], Path],
    stores: dict[str, Path],
    weights: dict[str, Path],
    tokens: Path,
) -> None:
    """Compare the dictionaries of a study.

    Args:
        settings: `dictionaries` and `sizes` of the study.
        dictionaries: artifact by role, layer and dictionary.
        stores: activation artifact by role; tokens: their tokens artifact.
        weights: transformers folder of the policy by role.
    """
    inputs = {f"{role} layer {layer} {name}": path for (role, layer, name), path in dictionaries.items()}
    inputs |= {f"{role} activations": path for role, path in stores.items()} | {"tokens": tokens}
    with Stage("comparison", out, settings, inputs, work) as stage:
        check_same_training_rows(dictionaries)
        where = device()
        opened = {role: ActivationStore(path) for role, path in stores.items()}
        folders = {(*key, seed): path for key, folder in dictionaries.items() for seed, path in load_members(folder).items()}
        members = measure_all(folders, opened, where)
        latents, levels, aggregates, floors = [], [], [], []
        metrics: dict[str, Any] = {"layers": {}}
        for layer in sorted({layer for _, layer, _ in dictionaries}):
            rows = PairedRows(opened["base"], opened["tuned"], layer)
            maps = fit_linear_maps(rows, where)
            entry: dict[str, Any] = {"dictionaries": {}}
            if settings["sizes"]:
                entry["sizes"], found = size_similarities(members, layer, settings["sizes"])
                aggregates += found
            for name in settings["dictionaries"]:
                alike = similarities(members, layer, name)
                table, found = _latents(members, folders, rows, maps, alike, name, where)
                latents.append(table)
                levels += found
                aggregates += alike.aggregates
                floors.append(alike.floor)
                entry["dictionaries"][name] = {**alike.figures, "tags": tag_counts(table)}
            metrics["layers"][str(layer)] = entry
        paired = {key: folder for key, folder in folders.items() if ("base", *key[1:]) in folders}
        moved = transfer(paired, opened, weights, tokens, where)
        for layer, entry in metrics["layers"].items():
            for name, figures in entry["dictionaries"].items():
                figures |= moved.figures(int(layer), name)
        table = pd.concat(latents, ignore_index=True)
        if settings["sizes"]:
            table = add_size_matches(table, members, settings["sizes"])
        table = table.reindex(columns=COLUMNS).fillna(WITHOUT_PARTNER).astype(dict.fromkeys(WITHOUT_PARTNER, "int64"))
        table.to_parquet(stage.staging / "latents.parquet", index=False)
        scored = pd.DataFrame(levels).join(pd.concat([moved.by_seed, own_scores(folders, paired)]), on=KEY)
        scored.to_parquet(stage.staging / "levels.parquet", index=False)
        counts = {"latents": "Int64"}  # of the scores there is none
        pd.DataFrame(aggregates + moved.aggregates).astype(counts).to_parquet(stage.staging / "aggregates.parquet", index=False)
        pd.concat(floors, ignore_index=True).to_parquet(stage.staging / "floor.parquet", index=False)
        stage.publish(metrics)


def own_scores(folders: dict[Key, Path], paired: dict[Key, Path]) -> pd.DataFrame:
    """Scores of the dictionaries that read the rows of both policies, by layer, dictionary, seed and role."""
    found = {
        (layer, name, seed, role): Manifest.read(path.parents[1]).metrics[path.name]
        for (role, layer, name, seed), path in folders.items()
        if (role, layer, name, seed) not in paired
    }
    rows = [dict(zip(KEY, key, strict=True)) | {score: metrics[score] for score in SCORES} for key, metrics in found.items()]
    return pd.DataFrame(rows, columns=[*KEY, *SCORES]).set_index(KEY)


def check_same_training_rows(dictionaries: dict[tuple[str, int, str], Path]) -> None:
    """
    Raises:
        RlsaeError: the dictionaries of base and tuned were trained on other rows or in another order; they are no pair.
    """
    for (role, layer, name), folder in dictionaries.items():
        if role == "tuned" or ("tuned", layer, name) not in dictionaries:
            continue
        base, tuned = (Manifest.read(path).metrics for path in (folder, dictionaries["tuned", layer, name]))
        for seed in base.keys() & tuned.keys():
            if base[seed].get("rows_digest") != tuned[seed].get("rows_digest"):
                raise RlsaeError(
                    f"layer {layer}, dictionary {name}, {seed}: base and tuned were trained on other rows; "
                    "train both on stores of the same tokens"
                )


def _latents(
    members: Members,
    folders: dict[Key, Path],
    rows: PairedRows,
    maps: LinearMaps,
    alike: Similarities,
    name: str,
    where: torch.device,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Rows of `latents.parquet` and of `levels.parquet` of one layer and dictionary."""
    layer, floor = rows.layer, alike.floor.match_cosine_decoder.to_numpy(float)
    tables: dict[tuple[str, int], pd.DataFrame] = {}
    levels = []
    roles = [role for role in ROLES if any(key[:3] == (role, layer, name) for key in folders)]
    for seed in sorted(seed for role, *place, seed in folders if [role, *place] == ["tuned", layer, name]):
        saes = {role: SparseAutoencoder.load(folders[role, layer, name, seed]).to(where) for role in roles}
        change = pair_change(saes, rows, maps, where)
        levels += [{"layer": layer, "dictionary": name, "seed": seed} | level for level in change.levels]
        matchings = alike.matchings.get(seed, {})
        partners = {role: matching.partner for role, matching in matchings.items()}
        firing = agreement(saes, rows, partners, where) if matchings else {}
        for role in roles:
            own = members[role, layer, name, seed]
            key = {"role": role, "layer": layer, "dictionary": name, "seed": seed, "latent": np.arange(len(own.firings))}
            active = {column: getattr(own, column) for column in ("firings", "density", "mean_active", "max_active")}
            table = pd.DataFrame({**key, **active}).join(change.columns[role])
            if matchings:
                matched = match_columns(own, members[other_role(role), layer, name, seed], matchings[role], floor)
                table = table.assign(**matched).join(firing[role])
            elif saes[role].reads == "both":
                table = table.assign(**part_columns(saes[role]))
            if (step_F := saes[role].model_step_F) is not None:
                table = table.assign(model_step_cosine=step_F.numpy())
            tables[role, seed] = table
    for role in roles:
        of_role = {seed: table for (of, seed), table in tables.items() if of == role}
        decoders = {seed: members[role, layer, name, seed].decoder_FD for seed in of_role}
        recurs = replicated({seed: table.tag.to_numpy() for seed, table in of_role.items()}, decoders)
        for seed, table in of_role.items():
            table["replicated"] = recurs[seed]
    return pd.concat(tables.values(), ignore_index=True), levels
