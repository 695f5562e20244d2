"""Uncertainty of averages, and what counts as an outlier."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
AT_ONCE = 1 << 20
"""Values that are drawn at once."""
OUTLIER = 10
"""A row is an outlier when its norm is above so many medians: attention sinks have such rows (Sun et al. 2024)."""


def bootstrap_ci95(values: NDArray[np.floating], seed: int = 0) -> list[float]:
    """Percentile interval of the mean of `values` [n], resampled 2,000 times (Efron 1979); [nan, nan] if n is 0."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return [float("nan"), float("nan")]
    rng = np.random.default_rng(seed)
    together = max(1, AT_ONCE // len(values))
    sizes = [min(together, RESAMPLES - first) for first in range(0, RESAMPLES, together)]
    means = np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes])
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


@lru_cache(maxsize=1)
def bootstrap_weights(units: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """How often each of `units` units is drawn in each bootstrap resample [resample, unit]: for sums over units."""
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
    weights = draws.astype(np.float64)
    weights.flags.writeable = False  # the next caller gets the same array
    return weights
