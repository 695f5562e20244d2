"""Ridge regression whose every prediction is held out, for many labellings of the same rows at once.

    w = argmin ‖y − Z w‖² + α ‖w‖²,    ŷ = Z w,    Z: features standardised on the training rows

as scikit-learn's `StandardScaler` and `Ridge`, but in its dual form: one eigendecomposition of the rows' products serves all
α and all labellings, so that 200 permutations are fitted like the labels themselves. There is no intercept: rewards have a
zero, and the mean of a training fold is the higher the lower that of its test fold is, which would make τ of permuted labels
negative and every p too small. Shapes: N rows, F features, P labellings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

Array = NDArray[np.float64]
ALPHAS = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""Penalties, in units of the number of features; of equally good ones the first is taken."""
FOLDS = 5
INNER_FOLDS = 4


def folds(
    groups_N: Sequence[str], blocks_N: NDArray[np.int64], seed: int, splits: int = FOLDS
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Training and test rows: every row is tested once, and no group is on both sides.

    Rows of a test row's block (the same context with another word) do not train either: what they share with it says only
    that its label is another one. Where each block has a row of one group, nothing is left to train on.
    """
    rows = np.arange(len(groups_N))
    split = GroupKFold(min(splits, len(set(groups_N))), shuffle=True, random_state=seed)
    for train, test in split.split(rows, groups=groups_N):
        yield train[~np.isin(blocks_N[train], blocks_N[test])], test


def held_out_predictions(
    features_NF: NDArray[np.floating], labels_NP: Array, groups_N: Sequence[str], blocks_N: NDArray[np.int64], seed: int = 0
) -> Array:
    """A prediction of every row from rows of other groups and blocks [N, P]; each labelling has its α, by inner folds.

    Every one of `folds` must leave rows of two groups to train on.
    """
    names = np.asarray(groups_N)
    predicted = np.empty_like(labels_NP)
    for train, test in folds(groups_N, blocks_N, seed):
        kernel = _products(features_NF, train)
        errors = np.zeros((len(ALPHAS), labels_NP.shape[1]))
        for inner, outer in folds(names[train].tolist(), blocks_N[train], seed, INNER_FOLDS):
            fitted, held = train[inner], train[outer]
            for number, guess in enumerate(_solve(kernel, labels_NP, fitted, held)):
                errors[number] += ((guess - labels_NP[held]) ** 2).sum(0)
        best = errors.argmin(0)
        for number, guess in enumerate(_solve(kernel, labels_NP, train, test)):
            predicted[np.ix_(test, best == number)] = guess[:, best == number]
    return predicted


def _products(features_NF: NDArray[np.floating], train: NDArray[np.int64]) -> Array:
    """Products of all rows [N, N] per feature, standardised on the training rows; features that are constant there are 0."""
    mean, deviation = features_NF[train].mean(0), features_NF[train].std(0)
    varies = deviation > 1e-6 * np.maximum(1, np.abs(mean))
    Z_NF = (features_NF[:, varies] - mean[varies]) / deviation[varies]
    return (Z_NF @ Z_NF.T).astype(np.float64) / max(1, features_NF.shape[1])


def _solve(kernel: Array, labels_NP: Array, train: NDArray[np.int64], test: NDArray[np.int64]) -> Iterator[Array]:
    """Predictions of the test rows for each of `ALPHAS` [test, P]."""
    K = kernel[np.ix_(train, train)]
    across = kernel[np.ix_(test, train)]
    values, vectors = np.linalg.eigh(K)
    left, right = across @ vectors, vectors.T @ labels_NP[train]
    for alpha in ALPHAS:
        yield left @ (right / (np.maximum(values, 0) + alpha)[:, None])
