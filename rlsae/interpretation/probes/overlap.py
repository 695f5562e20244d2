"""Are tagged latents active where the reward is high? (arXiv 2310.08164 table 7.) Shapes: R rows, F latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from rlsae.statistics import bootstrap_weights

HIGH = 0.75
"""Quantile of the predictions from which a reward is high."""
SETS = 1999
"""Random sets of as many latents."""


def lift(
    predictions: NDArray[np.floating],
    active_RF: NDArray[np.bool_],
    tagged: NDArray[np.bool_],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How much likelier tagged latents are active where the reward is high than all latents are.

    Args:
        predictions: reward of each row, predicted or real [R]; high is the top quarter.
        active_RF: which latent is active at which row.
        tagged: which latents are meant [F].
        groups: unit of each row that is resampled for the interval, its word; rows by default.

    Returns:
        `share_*`: of (row, latent) that are active. `lift_high` = share_tagged_high / share_all_high, `lift_low` at the
        other rows. `odds_ratio` of being active, tagged against other latents, at high rows (½ added to each cell), with a
        bootstrap interval over groups. `p`: share of random sets of as many latents as active at high rows. `p_fisher`:
        Fisher's exact test of the four cells, which takes every (row, latent) as independent and is far too small. All nan
        with a `status` where no latent is tagged, all are, or no row is lower than the high ones.
    """
    high = predictions >= np.quantile(predictions, HIGH) if len(predictions) else np.zeros(0, bool)
    facts: dict[str, Any] = {
        "rows": len(high),
        "rows_high": int(high.sum()),
        "latents": len(tagged),
        "tagged": int(tagged.sum()),
    }
    names = ["share_tagged_high", "share_all_high", "share_tagged_low", "share_all_low", "lift_high", "lift_low"]
    names += ["odds_ratio", "ci_low", "ci_high", "p", "p_fisher"]
    if not tagged.any() or tagged.all() or high.all():
        why = (
            "no latent is tagged" if not tagged.any() else "all latents are tagged" if tagged.all() else "all rewards are equal"
        )
        return facts | dict.fromkeys(names, float("nan")) | {"status": why}
    shares = [active_RF[np.ix_(side, who)].mean() for side in (high, ~high) for who in (tagged, np.ones_like(tagged))]
    lifts = [_ratio(shares[0], shares[1]), _ratio(shares[2], shares[3])]
    # Per group: tagged active, tagged silent, others active, others silent, at high rows.
    active = np.stack([active_RF[:, tagged].sum(1), active_RF[:, ~tagged].sum(1)], 1)
    cells_R4 = (np.stack([active, [tagged.sum(), (~tagged).sum()] - active], 2) * high[:, None, None]).reshape(-1, 4)
    unit = np.unique(np.arange(len(high)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    cells_G4 = np.stack([np.bincount(unit, cells_R4[:, cell]) for cell in range(4)], 1)
    ratios = _odds_ratio(bootstrap_weights(len(cells_G4), seed=seed) @ cells_G4)
    totals = cells_G4.sum(0)
    count_F = active_RF[high].sum(0)
    rng = np.random.default_rng([seed, 5])
    drawn = np.array([count_F[rng.permutation(len(tagged))[: tagged.sum()]].sum() for _ in range(SETS)])
    p = (1 + (drawn >= count_F[tagged].sum()).sum()) / (1 + SETS)
    p_fisher = fisher_exact(totals.reshape(2, 2).astype(int), alternative="greater").pvalue
    interval = np.quantile(ratios, [0.025, 0.975])
    values = [*shares, *lifts, _odds_ratio(totals[None])[0], *interval, p, p_fisher]
    return facts | {name: float(value) for name, value in zip(names, values, strict=True)} | {"status": "scored"}


def _odds_ratio(cells_B4: NDArray[np.floating]) -> NDArray[np.floating]:
    """(tagged active · others silent) / (tagged silent · others active), ½ added to each (Haldane 1956)."""
    a, b, c, d = (cells_B4 + 0.5).T
    return a * d / (b * c)


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else float("nan")
