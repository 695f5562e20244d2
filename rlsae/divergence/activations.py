"""How far the activations of each layer moved, on the same rows of base and tuned.

With rows b_n, t_n of base and tuned, Δ_n = t_n - b_n, means over the N rows, and centred rows B̃, T̃ [N, D]:

    activation_l2_relative        Σ‖Δ_n‖ / Σ‖b_n‖
    activation_cosine             1 - mean cos(b_n, t_n)
    activation_cka                1 - ‖B̃ᵀT̃‖²_F / (‖B̃ᵀB̃‖_F ‖T̃ᵀT̃‖_F): 1 - linear CKA (Kornblith et al. 2019, arXiv 1905.00414,
                                  equation 4), blind to rotation and scale
    activation_mean_shift         ‖mean Δ‖ / root of mean ‖b_n‖²: what one vector for all rows explains
    activation_residual_shift     root of mean ‖Δ_n - mean Δ‖² / root of mean ‖b_n‖²: the rest; their squares add up
    activation_covariance_shift   ‖T̃ᵀT̃ - B̃ᵀB̃‖_F / ‖B̃ᵀB̃‖_F

Intervals resample groups of neighbouring documents (documents lie in random order): `GROUPS` of them, and `COARSE` for the
measures that need a D × D matrix per group. So memory does not grow with the rows.
Shapes: N rows, G groups, K coarse groups, D channels, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore
from rlsae.divergence.table import Array, Measured
from rlsae.errors import RlsaeError
from rlsae.statistics import bootstrap_weights

GROUPS = 256
COARSE = 16
COARSE_RESAMPLES = 200
ROWS = 4096
"""Rows in memory at once."""


def activation_divergence(base: ActivationStore, tuned: ActivationStore) -> list[Measured]:
    """Every activation measure of each layer; one layer in memory.

    Raises:
        RlsaeError: the stores hold different tokens, layers or widths.
    """
    base.check_same_tokens(tuned)
    check_same_layers(base, tuned)
    documents = len(base.start) - 1
    groups, coarse = min(GROUPS, documents), min(COARSE, documents)
    weights_RG, weights_RK = bootstrap_weights(groups), bootstrap_weights(coarse, COARSE_RESAMPLES)
    layers = [measures_of_layer(base, tuned, layer, weights_RG, weights_RK) for layer in base.layers]
    hook = str(base.group.attrs["hook"])
    draws = {measure: np.stack([found[measure] for found in layers], 1) for measure in layers[0]}
    return [Measured(measure, hook, values[0], values[1:]) for measure, values in draws.items()]


def measures_of_layer(
    base: ActivationStore, tuned: ActivationStore, layer: int, weights_RG: Array, weights_RK: Array
) -> dict[str, Array]:
    """Each measure of one layer: its value, then its values in the resamples."""
    shifts, moments = sums_of_layer(base, tuned, layer, weights_RG.shape[1], weights_RK.shape[1])
    found: dict[str, Array] = {}
    for measures, weights in ((shifts.measures, weights_RG), (moments.measures, weights_RK)):
        draws = [measures(w) for w in (np.ones(weights.shape[1]), *weights)]
        found |= {measure: np.array([draw[measure] for draw in draws]) for measure in draws[0]}
    return found


def sums_of_layer(
    base: ActivationStore, tuned: ActivationStore, layer: int, groups: int, coarse: int
) -> tuple[Shifts, Moments]:
    """What is summed over the rows of one layer, for each group of documents."""
    documents, channels = len(base.start) - 1, base.acts(layer).shape[1]
    shifts, moments = Shifts.zeros(groups, channels), Moments.zeros(coarse, channels)
    for first in range(0, base.rows, ROWS):
        stop = min(first + ROWS, base.rows)
        before_ND, after_ND = (store.read(layer, first, stop).astype(np.float64) for store in (base, tuned))
        document_N = np.searchsorted(base.start, np.arange(first, stop), "right") - 1
        group_N = document_N * groups // documents
        shifts.add(group_N, before_ND, after_ND)
        moments.add(group_N * coarse // groups, before_ND, after_ND)
    return shifts, moments


@dataclass
class Shifts:
    """Sums over the rows of each group that tell how far rows moved."""

    rows_G: Array
    base_norm_G: Array
    shift_norm_G: Array
    cosine_G: Array
    base_square_G: Array
    shift_square_G: Array
    shift_GD: Array

    @classmethod
    def zeros(cls, groups: int, channels: int) -> Shifts:
        shapes: list[Any] = [(groups,)] * (len(fields(cls)) - 1) + [(groups, channels)]
        return cls(*map(np.zeros, shapes))

    def add(self, group_N: NDArray[np.int64], before_ND: Array, after_ND: Array) -> None:
        """Add rows, each with the number of its group; the numbers rise."""
        shift_ND = after_ND - before_ND
        base_square_N, tuned_square_N = _dots(before_ND, before_ND), _dots(after_ND, after_ND)
        shift_square_N, dot_N = _dots(shift_ND, shift_ND), _dots(before_ND, after_ND)
        # One root of the product, so that equal rows give exactly 1; rows that are 0 in both are equal too.
        product_N = base_square_N * tuned_square_N
        equal_N = (base_square_N == 0) & (tuned_square_N == 0)
        cosine_N = np.where(equal_N, 1.0, dot_N / np.sqrt(np.where(product_N == 0, 1.0, product_N)))
        for sums_G, values_N in (
            (self.rows_G, np.ones(len(group_N))),
            (self.base_norm_G, np.sqrt(base_square_N)),
            (self.shift_norm_G, np.sqrt(shift_square_N)),
            (self.cosine_G, cosine_N),
            (self.base_square_G, base_square_N),
            (self.shift_square_G, shift_square_N),
        ):
            sums_G += np.bincount(group_N, values_N, len(sums_G))
        present, starts = np.unique(group_N, return_index=True)
        self.shift_GD[present] += np.add.reduceat(shift_ND, starts, axis=0)

    def measures(self, weights_G: Array) -> dict[str, float]:
        """The measures with each group counted so many times."""

        def total(values_G: Array) -> float:
            return float(weights_G @ values_G)

        rows, base_square = total(self.rows_G), total(self.base_square_G)
        mean_D = (weights_G @ self.shift_GD) / rows
        mean_square = float(mean_D @ mean_D)
        residual = max(0.0, total(self.shift_square_G) / rows - mean_square)
        return {
            "activation_l2_relative": _quotient(total(self.shift_norm_G), total(self.base_norm_G)),
            "activation_cosine": max(0.0, 1 - total(self.cosine_G) / rows),
            "activation_mean_shift": math.sqrt(_quotient(mean_square, base_square / rows)),
            "activation_residual_shift": math.sqrt(_quotient(residual, base_square / rows)),
        }


@dataclass
class Moments:
    """Sums and second moments of the rows of each group: what covariances follow from."""

    rows_K: Array
    base_KD: Array
    tuned_KD: Array
    base_base_KDD: Array
    tuned_tuned_KDD: Array
    base_tuned_KDD: Array

    @classmethod
    def zeros(cls, groups: int, channels: int) -> Moments:
        shapes: list[Any] = [(groups,), *[(groups, channels)] * 2, *[(groups, channels, channels)] * 3]
        return cls(*map(np.zeros, shapes))

    def add(self, group_N: NDArray[np.int64], before_ND: Array, after_ND: Array) -> None:
        """Add rows, each with the number of its group."""
        for k in np.unique(group_N):
            before, after = before_ND[group_N == k], after_ND[group_N == k]
            self.rows_K[k] += len(before)
            self.base_KD[k] += before.sum(0)
            self.tuned_KD[k] += after.sum(0)
            own_DD = before.T @ before
            same = np.array_equal(before, after)  # BᵀB and BᵀT of equal rows are rounded differently
            self.base_base_KDD[k] += own_DD
            self.tuned_tuned_KDD[k] += own_DD if same else after.T @ after
            self.base_tuned_KDD[k] += own_DD if same else before.T @ after

    def measures(self, weights_K: Array) -> dict[str, float]:
        """The measures with each group counted so many times."""
        rows, base_D, tuned_D = weights_K @ self.rows_K, weights_K @ self.base_KD, weights_K @ self.tuned_KD

        def centred(moments_KDD: Array, left_D: Array, right_D: Array) -> Array:
            return np.tensordot(weights_K, moments_KDD, 1) - np.outer(left_D, right_D) / rows

        base_DD, tuned_DD = centred(self.base_base_KDD, base_D, base_D), centred(self.tuned_tuned_KDD, tuned_D, tuned_D)
        base_square, tuned_square = _square(base_DD), _square(tuned_DD)
        cross_square = _square(centred(self.base_tuned_KDD, base_D, tuned_D))
        neither_varies = base_square == 0 and tuned_square == 0
        similarity = 1.0 if neither_varies else _quotient(cross_square, math.sqrt(base_square * tuned_square))
        return {
            "activation_cka": max(0.0, 1 - similarity),
            "activation_covariance_shift": math.sqrt(_quotient(_square(tuned_DD - base_DD), base_square)),
        }


def check_same_layers(base: ActivationStore, tuned: ActivationStore) -> None:
    """
    Raises:
        RlsaeError: the stores hold different layers or widths.
    """
    if base.layers != tuned.layers:
        raise RlsaeError(
            f"the survey stores hold different layers: {base.layers} of the base, {tuned.layers} of the tuned model"
        )
    layer = base.layers[0]
    widths = [store.acts(layer).shape[1] for store in (base, tuned)]
    if widths[0] != widths[1]:
        raise RlsaeError(f"layer {layer}: {widths[0]} channels in the base's survey, {widths[1]} in the tuned model's")


def _dots(left_ND: Array, right_ND: Array) -> Array:
    return np.einsum("nd,nd->n", left_ND, right_ND)


def _square(matrix_DD: Array) -> float:
    return float(np.square(matrix_DD).sum())


def _quotient(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
