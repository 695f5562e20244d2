"""How well held-out predictions order, explain and sign a reward, with intervals over groups of rows.

Every score is a ratio of sums over rows or over pairs of rows. Summed once per group or pair of groups, a bootstrap over
groups is a product with their weights: 2,000 resamples of Kendall's τ cost about as much as one. Shapes: N rows, G groups,
R resamples, P permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsae.statistics import bootstrap_weights

Array = NDArray[np.float64]
BLOCK = 512
"""Rows whose pairs with all others are held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A score, and the score of each bootstrap resample."""

    value: float
    resampled_R: Array

    @property
    def ci95(self) -> tuple[float, float]:
        """Percentile interval; nan where every resample is."""
        if np.isnan(self.resampled_R).all():
            return float("nan"), float("nan")
        low, high = np.nanquantile(self.resampled_R, [0.025, 0.975])
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference: both were resampled alike."""
        return Estimate(self.value - other.value, self.resampled_R - other.resampled_R)


@dataclass(frozen=True)
class Groups:
    """Rows by the unit that is drawn: a word, a prompt."""

    number_N: NDArray[np.int64]
    weights_RG: Array
    """The first is 1 throughout: the score itself. The others are bootstrap resamples."""

    @classmethod
    def of(cls, names: Sequence[object], seed: int = 0) -> Groups:
        unique, number_N = np.unique(np.asarray(names), return_inverse=True)
        weights = bootstrap_weights(len(unique), seed=seed)
        return cls(number_N, np.concatenate([np.ones((1, len(unique))), weights]))

    def sums(self, values_N: Array) -> Array:
        """Weighted sums over rows [1 + R]."""
        return self.weights_RG @ np.bincount(self.number_N, values_N, minlength=self.weights_RG.shape[1])

    def pair_sums(self, pairs: Array) -> Array:
        """Weighted sums over pairs of groups [1 + R] of sums [G, G]."""
        return np.einsum("rg,rg->r", self.weights_RG @ pairs, self.weights_RG)


def kendall_tau(prediction_N: Array, truth_N: Array, groups: Groups) -> Estimate:
    """τ-b (Kendall 1945), ties of both counted; nan where either has one value."""
    agreeing, predicted, true = _pair_signs(prediction_N, truth_N, groups)
    return _ratio(groups.pair_sums(agreeing), np.sqrt(groups.pair_sums(predicted) * groups.pair_sums(true)))


def r_squared(prediction_N: Array, truth_N: Array, groups: Groups) -> Estimate:
    """1 − Σ(y − ŷ)² / Σ(y − mean y)², below 0 where the mean is the better prediction."""
    count, total, squares = (groups.sums(values) for values in (np.ones_like(truth_N), truth_N, truth_N**2))
    error = groups.sums((truth_N - prediction_N) ** 2)
    explained = _ratio(error, squares - total**2 / np.maximum(count, 1))
    return Estimate(1 - explained.value, 1 - explained.resampled_R)


def share(right_N: NDArray[np.bool_], groups: Groups, among_N: NDArray[np.bool_] | None = None) -> Estimate:
    """Share of right rows among some."""
    among = np.ones_like(right_N) if among_N is None else among_N
    return _ratio(groups.sums((right_N & among).astype(float)), groups.sums(among.astype(float)))


def auc(score_N: Array, positive_N: NDArray[np.bool_], groups: Groups) -> Estimate:
    """Area under the ROC curve: P(a positive row scores higher than a negative one), ties half."""
    higher = np.zeros((groups.weights_RG.shape[1],) * 2)
    negative = np.flatnonzero(~positive_N)
    for row in np.flatnonzero(positive_N):
        wins = (np.sign(score_N[row] - score_N[negative]) + 1) / 2
        higher[groups.number_N[row]] += np.bincount(groups.number_N[negative], wins, minlength=len(higher))
    pairs = groups.sums(positive_N.astype(float)) * groups.sums((~positive_N).astype(float))
    return _ratio(groups.pair_sums(higher), pairs)


def permuted_p(value: float, permuted_P: Array) -> float:
    """(1 + how many permutations score as high) / (1 + permutations), one-sided (Phipson and Smyth 2010)."""
    scored = permuted_P[~np.isnan(permuted_P)]
    return float((1 + (scored >= value).sum()) / (1 + len(scored))) if np.isfinite(value) else float("nan")


def _pair_signs(x_N: Array, y_N: Array, groups: Groups) -> tuple[Array, Array, Array]:
    """Per pair of groups [G, G]: Σ sign Δx sign Δy, pairs with Δx ≠ 0, pairs with Δy ≠ 0."""
    size = groups.weights_RG.shape[1]
    member_NG = np.zeros((len(x_N), size), np.float32)
    member_NG[np.arange(len(x_N)), groups.number_N] = 1
    found = [np.zeros((size, size)) for _ in range(3)]
    for first in range(0, len(x_N), BLOCK):
        block = slice(first, first + BLOCK)
        x, y = (np.sign(v[block, None] - v).astype(np.float32) for v in (x_N, y_N))
        for total, signs in zip(found, (x * y, abs(x), abs(y)), strict=True):
            total += member_NG[block].T @ (signs @ member_NG)
    return found[0], found[1], found[2]


def _ratio(top_R: Array, bottom_R: Array) -> Estimate:
    ratio = np.divide(top_R, bottom_R, out=np.full_like(top_R, np.nan), where=bottom_R > 1e-12)
    return Estimate(float(ratio[0]), ratio[1:])
