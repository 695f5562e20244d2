"""Judges: how well does an executable explanation predict a latent on windows of held-out documents?

- `detection`: are windows in which it fires predicted higher than silent ones? Area under the ROC curve.
- `fuzzing`: are the tokens at which it fires predicted higher than as many others of the same window? The share of windows,
  ties half.
- `simulation`: Pearson's correlation of predicted and true activations over all tokens (Bills et al. 2023).
- `intruder`: of four windows in which it fires and a silent one, is the silent one predicted lowest? The share of draws.

Chance is 0.5 for the first two, 0 for the third, 0.2 for the fourth. Intervals are 95 % bootstrap intervals over windows.
Detection and fuzzing after delphi (Paulo et al., arXiv 2410.13928). Shapes: W windows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from rlsae.interpretation.explanation import Explanation, Judge, Score
from rlsae.interpretation.windows import Window
from rlsae.statistics import bootstrap_ci95

MIN_WINDOWS = 5
"""Windows of each kind below which a score says little."""
RESAMPLES = 200
DRAWS = 50
SHOWN = 4
"""Windows in which the latent fires, beside the intruder."""

Array = NDArray[np.floating]


def judged(judge: Judge, explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
    """The score of an explanation, or the reason why it has none.

    Args:
        active, silent: held-out windows in which the latent fires, and does not.
    """
    if not explanation.text:
        return Score.none(explanation.status)
    if explanation.predict is None:
        return Score.none("a text alone: only a language model can judge it")
    if len(active) < MIN_WINDOWS or (judge in BESIDE_SILENT and len(silent) < MIN_WINDOWS):
        return Score.none(f"{len(active)} held-out windows in which it fires, {len(silent)} others: not scored")
    return judge(explanation, active, silent, seed)


def _scored(value: Any, ci95: Iterable[float]) -> Score:
    low, high = ci95
    return Score(float(value), float(low), float(high))


def predicted_largest(explanation: Explanation, windows: Sequence[Window]) -> Array:
    """Largest prediction in each window [W]."""
    assert explanation.predict
    return np.array([explanation.predict(window).max() for window in windows])


def ranking_auc(high: Array, low: Array) -> float:
    """Probability that one of `high` is larger than one of `low`, ties half (Mann and Whitney 1947)."""
    ranks = rankdata(np.concatenate([high, low]))[: len(high)]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def detection(explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
    high, low = predicted_largest(explanation, active), predicted_largest(explanation, silent)
    rng = np.random.default_rng(seed)
    right_HL = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    drawn_RH, drawn_RL = (rng.multinomial(len(side), np.full(len(side), 1 / len(side)), RESAMPLES) for side in (high, low))
    again_R = np.einsum("rh,hl,rl->r", drawn_RH, right_HL, drawn_RL, optimize=True) / right_HL.size
    return _scored(right_HL.mean(), np.quantile(again_R, [0.025, 0.975]))


def fuzzing(explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
    assert explanation.predict
    rng = np.random.default_rng(seed)
    right = []
    for window in active:
        fires, others = np.flatnonzero(window.acts > 0), np.flatnonzero(window.acts <= 0)
        if not len(others):
            continue
        predicted = explanation.predict(window)
        shown = fires if len(fires) <= len(others) else rng.choice(fires, len(others), replace=False)
        true, wrong = predicted[shown].mean(), predicted[rng.choice(others, len(shown), replace=False)].mean()
        right.append((true > wrong) + 0.5 * (true == wrong))
    if len(right) < MIN_WINDOWS:
        return Score.none("it fires at nearly all tokens of its windows")
    return _scored(np.mean(right), bootstrap_ci95(np.array(right), seed))


def simulation(explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
    assert explanation.predict
    windows = [*active, *silent]
    predicted, true = [explanation.predict(window) for window in windows], [window.acts for window in windows]
    if not np.concatenate(predicted).std():
        return Score(0.0, 0.0, 0.0)
    # Sums of each window, of which a resample adds some.
    sums_W6 = np.array(
        [[len(p), p.sum(), t.sum(), (p * p).sum(), (t * t).sum(), (p * t).sum()] for p, t in zip(predicted, true, strict=True)]
    )
    weights = np.random.default_rng(seed).multinomial(len(windows), np.full(len(windows), 1 / len(windows)), RESAMPLES)
    return _scored(_pearson(sums_W6.sum(0)), np.nanquantile(_pearson((weights @ sums_W6).T), [0.025, 0.975]))


def _pearson(sums: Array) -> Array:
    count, p, t, pp, tt, pt = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        return (pt / count - p * t / count**2) / np.sqrt((pp / count - (p / count) ** 2) * (tt / count - (t / count) ** 2))


def intruder(explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score:
    high, low = predicted_largest(explanation, active), predicted_largest(explanation, silent)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        shown, odd = rng.choice(high, SHOWN, replace=False), rng.choice(low)
        found.append(float(odd <= shown.min()) / (1 + (shown == odd).sum()))
    return _scored(np.mean(found), bootstrap_ci95(np.array(found), seed))


BESIDE_SILENT = (detection, intruder)
"""Judges that need windows in which the latent does not fire: one that fires everywhere has none."""
JUDGES: dict[str, Judge] = {"detection": detection, "fuzzing": fuzzing, "simulation": simulation, "intruder": intruder}
