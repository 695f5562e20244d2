"""How well tags find what a plant has planted. Shapes: F latents, K known directions, D channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlsae.comparison.kinds import UNTESTED
from rlsae.plants.plant import Truth

COVERS, RELATED = 0.7, 0.5
"""Cosines from which a latent covers a direction, and from which it has to do with it."""
SMALLEST_ANGLE = 30
"""Rotations below it may be missed: they are near the smallest effect that counts."""


@dataclass(frozen=True)
class Score:
    """How well tags find what was planted. Planted changes: all but rotations below 30 degrees."""

    recall: float
    """Share of the planted changes that a tagged latent of cosine ≥ 0.7 finds."""
    coverage: float
    """Share of the planted changes that some tested latent of cosine ≥ 0.7 could find."""
    recall_covered: float
    """Share found of those."""
    false_discovery: float
    """Share of the tagged latents with cosine < 0.5 to every changed direction; 0 without tags."""
    kind_accuracy: float
    """Share of the other tagged latents whose tag is the kind of the nearest changed direction."""
    tagged: float
    """Share of the tested latents that are tagged."""
    tags: int
    """Their number."""
    tested: int
    """Latents that are tested."""


def score(truth: Truth, latents: pd.DataFrame, decoders: dict[str, NDArray[np.floating]]) -> tuple[Score, pd.DataFrame]:
    """Compare the tags of one pair of dictionaries with the truth.

    Args:
        latents: `role latent tag` of both dictionaries, in the order of the latents.
        decoders: unit directions that the latents write [F, D], by role.

    Returns:
        the scores, and the table of the truth with columns `covered` and `found`.
    """
    table = truth.table
    covered_K, found_K = np.zeros((2, len(table)), bool)
    changed_K = (table.kind != "unchanged").to_numpy()
    tagged, false, right = 0, 0, 0
    for role, own_KD in (("base", truth.base_KD), ("tuned", truth.tuned_KD)):
        tag_F = latents.tag[latents.role == role].to_numpy()
        tested_F = ~np.isin(tag_F, UNTESTED)
        tagged_F = tested_F & (tag_F != "unchanged")
        cosine_FK = _cosines(decoders[role], own_KD)
        covered_K |= (cosine_FK[tested_F] >= COVERS).any(0)
        found_K |= (cosine_FK[tagged_F] >= COVERS).any(0)
        either_FK = np.maximum(_cosines(decoders[role], truth.base_KD), _cosines(decoders[role], truth.tuned_KD))
        either_FK[:, ~changed_K] = -1
        near_F = tagged_F & (either_FK.max(1) >= RELATED)
        kind_F = table.kind.to_numpy()[either_FK[near_F].argmax(1)]
        tagged += int(tagged_F.sum())
        false += int((tagged_F & ~near_F).sum())
        right += int((tag_F[near_F] == kind_F).sum())
    table = table.assign(covered=covered_K, found=found_K)
    changes = planted(table)
    tested = int((~latents.tag.isin(UNTESTED)).sum())
    found = Score(
        recall=changes.found.mean(),
        coverage=changes.covered.mean(),
        recall_covered=changes.found[changes.covered].mean(),
        false_discovery=false / max(tagged, 1),
        kind_accuracy=right / max(tagged - false, 1),
        tagged=tagged / max(tested, 1),
        tags=tagged,
        tested=tested,
    )
    return found, table


def _cosines(unit_FD: NDArray[np.floating], vectors_KD: NDArray[np.floating]) -> NDArray[np.floating]:
    """Cosines [F, K]; 0 for vectors of zeros."""
    length_K = np.linalg.norm(vectors_KD, axis=1)
    return unit_FD @ vectors_KD.T / np.where(length_K > 0, length_K, 1)


def planted(table: pd.DataFrame) -> pd.DataFrame:
    """The directions whose change must be found."""
    return table[(table.kind != "unchanged") & ~((table.kind == "rotated") & (table.angle < SMALLEST_ANGLE))]
