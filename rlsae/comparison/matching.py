"""Matching of latents by the directions that they write: description only, it decides nothing.

Independent dictionaries of one model share only part of their latents (arXiv 2501.16615), so every figure stands beside its
floor: the same figure between two seeds of one model. Shapes: F and G latents, B of them, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from rlsae.statistics import bootstrap_ci95

ASSIGNABLE = 16_384
"""Live latents up to which all pairs are weighed against each other: time grows with their cube, memory with their square."""
BLOCK = 1024
"""Latents whose cosines with all others are in memory at once."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Rows and columns of the paired latents, and their cosines."""
Pairing = Callable[[NDArray[np.floating], NDArray[np.floating]], Pairs]


@dataclass(frozen=True)
class Matching:
    """Partners of F latents of one dictionary in another."""

    partner: NDArray[np.int64]
    """Latent of the other dictionary [F]; -1 where there is none (dead, or none is left)."""
    cosine: NDArray[np.float64]
    """Decoder cosine with the partner [F]; nan where there is none."""


def match(
    own_FD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    own_alive: NDArray[np.bool_],
    other_alive: NDArray[np.bool_],
) -> Matching:
    """One-to-one partners: those with the largest sum of cosines (Hungarian method; arXiv 2310.08164 section 3.3), or mutual
    nearest neighbours where a dictionary has more than 16,384 live latents.

    Dead latents take no part: they keep their start, which pairs of one seed share and pairs of two seeds do not.

    Args:
        own_FD, other_GD: unit decoder rows.
        own_alive, other_alive: whether each latent fires on held-out rows.
    """
    assignable = max(own_alive.sum(), other_alive.sum()) <= ASSIGNABLE
    return _pair(_assigned if assignable else _mutual, own_FD, other_GD, own_alive, other_alive)


def match_nearest(
    own_FD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    own_alive: NDArray[np.bool_],
    other_alive: NDArray[np.bool_],
) -> Matching:
    """The partner of each live latent is the live one with the largest cosine, which others may share."""
    return _pair(_nearest, own_FD, other_GD, own_alive, other_alive)


def _pair(
    pairing: Pairing,
    own_FD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    own_alive: NDArray[np.bool_],
    other_alive: NDArray[np.bool_],
) -> Matching:
    """Pair live latents."""
    partner = np.full(len(own_FD), -1)
    cosine = np.full(len(own_FD), np.nan)
    own, other = np.flatnonzero(own_alive), np.flatnonzero(other_alive)
    if len(own) and len(other):
        rows, columns, cosines = pairing(own_FD[own], other_GD[other])
        partner[own[rows]] = other[columns]
        cosine[own[rows]] = cosines
    return Matching(partner, cosine)


def _assigned(own_FD: NDArray[np.floating], other_GD: NDArray[np.floating]) -> Pairs:
    cosines = own_FD.astype(np.float64) @ other_GD.T.astype(np.float64)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return rows, columns, cosines[rows, columns]


def _mutual(own_FD: NDArray[np.floating], other_GD: NDArray[np.floating]) -> Pairs:
    rows, columns, cosines = _nearest(own_FD, other_GD)
    back = _nearest(other_GD, own_FD)[1]
    both = back[columns] == rows
    return rows[both], columns[both], cosines[both]


def _nearest(own_FD: NDArray[np.floating], other_GD: NDArray[np.floating]) -> Pairs:
    """The nearest one of each, some of them at a time."""
    rows, columns = np.arange(len(own_FD)), np.empty(len(own_FD), np.int64)
    cosines = np.empty(len(own_FD))
    for first in range(0, len(own_FD), BLOCK):
        block = slice(first, first + BLOCK)
        cosines_BG = own_FD[block] @ other_GD.T
        columns[block] = cosines_BG.argmax(1)
        cosines[block] = cosines_BG.max(1)
    return rows, columns, cosines


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
