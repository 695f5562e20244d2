"""The tables of a pair's write changes: columns of `latents.parquet` and rows of `levels.parquet`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlsae.comparison.kinds import CHANGED, TAGS
from rlsae.comparison.linear_map import LinearMaps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import DIFFUSE, Tags, moved_share, tag_pair
from rlsae.comparison.write_change import WriteChange, write_changes
from rlsae.sae.dictionary import SparseAutoencoder


@dataclass(frozen=True)
class PairChange:
    """What a pair of dictionaries says about the change from base to tuned."""

    columns: dict[str, pd.DataFrame]
    """By role, one row per latent: `own` to `tag` and `scale_error`."""
    levels: list[dict[str, Any]]
    """How much of the difference of the rows each level holds, one row per role."""


def pair_change(saes: dict[str, SparseAutoencoder], rows: PairedRows, maps: LinearMaps, where: torch.device) -> PairChange:
    """Measure and test the write changes of the dictionaries of base and tuned, by role; or of one that reads both."""
    changes, rank = write_changes(saes, rows, maps, where)
    tags, minimum_effect = tag_pair(changes)
    bulk = np.concatenate([found.change[~np.isnan(tags[role].q)] for role, found in changes.items()])
    moved = moved_share(changes)
    columns = {role: _columns(found, tags[role]) for role, found in changes.items()}
    levels = []
    for role, found in changes.items():
        tagged = np.isin(tags[role].tag, CHANGED)
        levels.append(
            {
                "role": role,
                "difference": maps.difference / maps.variance,
                "mean_shift": maps.mean_shift,
                "linear_map": float(maps.explained_D[:rank].sum()),
                "rank": rank,
                "latents": maps.share(found.explained),
                "tagged": maps.share(float(found.energy[tagged].sum())),
                "moved": moved,
                "median_change": float(np.median(bulk)) if len(bulk) else float("nan"),
                "minimum_effect": minimum_effect,
                "diffuse": minimum_effect > DIFFUSE,
            }
        )
    return PairChange(columns, levels)


def _columns(found: WriteChange, tags: Tags) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "own": found.own,
            "write_change": found.change,
            "write_change_raw": found.change_raw,
            "write_ratio": found.ratio,
            "write_angle": found.angle,
            "p": tags.p,
            "q": tags.q,
            "tag": tags.tag,
            "scale_error": found.scale_error,
        }
    )


def tag_counts(table: pd.DataFrame) -> dict[str, int | None]:
    """Latents with each tag, and how many of the changed ones are replicated (None with one seed), over roles and seeds."""
    counted = Counter(table.tag)
    replicated = int(table.replicated.sum()) if table.seed.nunique() > 1 else None
    return {**{tag: counted[tag] for tag in TAGS}, "replicated": replicated}
