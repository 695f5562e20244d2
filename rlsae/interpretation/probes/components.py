"""How responses lie along the two directions in which what a probe reads varies most (arXiv 2310.08164 figure 5).

Shapes: N responses, F features.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

COLUMNS = ["pair", "chosen", "first", "second", "share_first", "share_second"]
"""`share_*`: of the variance, the same in every row."""


def principal_components(features_NF: NDArray[np.floating]) -> pd.DataFrame:
    """A row of `COLUMNS` per response: its place along the first two principal components of the features as they are.

    Args:
        features_NF: [N, F], chosen and rejected response of each pair, one pair after the other.

    Where less than two directions vary, there is no row.
    """
    if len(features_NF) < 3:
        return pd.DataFrame(columns=COLUMNS)
    centred_NF = features_NF - features_NF.mean(0, dtype=np.float64)
    left_N2, values, _ = np.linalg.svd(centred_NF, full_matrices=False)
    if len(values) < 2 or values[1] <= 1e-9 * max(values[0], 1e-30):
        return pd.DataFrame(columns=COLUMNS)
    places_N2 = left_N2[:, :2] * values[:2]
    places_N2 = places_N2 * np.sign(places_N2[np.abs(places_N2).argmax(0), [0, 1]])  # the sign of a component is arbitrary
    shares = values**2 / (values**2).sum()
    pairs = len(features_NF) // 2
    return pd.DataFrame(
        {
            "pair": np.repeat(np.arange(pairs), 2),
            "chosen": np.tile([True, False], pairs),
            "first": places_N2[:, 0],
            "second": places_N2[:, 1],
            "share_first": shares[0],
            "share_second": shares[1],
        }
    )
