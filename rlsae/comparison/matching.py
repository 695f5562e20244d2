"""Matching of latents by the directions that they write: description only, it decides nothing.

Independent dictionaries of one model share only part of their latents (arXiv 2501.16615), so every figure stands beside its
floor: the same figure between two seeds of one model. Shapes: F and G latents, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rlsae.statistics import bootstrap_ci95


@dataclass(frozen=True)
class Matching:
    """Partners of F latents of one dictionary in another."""

    partner: NDArray[np.int64]
    """Latent of the other dictionary [F]; -1 where there is none (dead, or the other has fewer alive)."""
    cosine: NDArray[np.float64]
    """Decoder cosine with the partner [F]; nan where there is none."""


def match(
    own_FD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    own_alive: NDArray[np.bool_],
    other_alive: NDArray[np.bool_],
) -> Matching:
    """One-to-one partners with the largest sum of cosines (Hungarian method; arXiv 2310.08164 section 3.3).

    Dead latents take no part: they keep their start, which pairs of one seed share and pairs of two seeds do not.

    Args:
        own_FD, other_GD: unit decoder rows.
        own_alive, other_alive: whether each latent fires on held-out rows.
    """
    partner = np.full(len(own_FD), -1)
    cosine = np.full(len(own_FD), np.nan)
    own, other = np.flatnonzero(own_alive), np.flatnonzero(other_alive)
    if len(own) and len(other):
        cosines = own_FD[own].astype(np.float64) @ other_GD[other].T.astype(np.float64)
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        partner[own[rows]] = other[columns]
        cosine[own[rows]] = cosines[rows, columns]
    return Matching(partner, cosine)


def mmcs(matchings: list[Matching]) -> tuple[float, list[float], int]:
    """Mean of the matched cosines over all latents with a partner, its 95 % interval over latents, and their number."""
    cosines = np.concatenate([m.cosine[~np.isnan(m.cosine)] for m in matchings]) if matchings else np.empty(0)
    mean = float(cosines.mean()) if len(cosines) else float("nan")
    return mean, bootstrap_ci95(cosines), len(cosines)


def percentile(values: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Share of `reference` at or below each value, in percent; nan for nan or without a reference."""
    reference = np.sort(reference[~np.isnan(reference)])
    if not len(reference):
        return np.full(len(values), np.nan)
    share = 100 * np.searchsorted(reference, values, side="right") / len(reference)
    return np.where(np.isnan(values), np.nan, share)
