"""`lexicon`: does a latent fire on words of one polarity? With a test that knows documents, not tokens, as independent.

Of the tokens where the latent fires, the mean polarity m = Σ a_d / Σ n_d, with a_d the polarity summed and n_d the tokens of
document d where it fires; against the mean of all tokens, with the variance Σ (a_d - m n_d)² / (Σ n_d)² of a ratio of sums over
clusters (Cochran 1977, 6.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.windows import Window

MIN_POLARITY = 0.5
"""Difference of the mean polarity below which a latent is about none, however certain it is; VADER's runs from -4 to 4."""
ALPHA = 0.01


def explain(evidence: Evidence) -> Explanation:
    """Names the polarity and the share of lexicon words, and predicts the polarity of each token where its sign agrees."""
    rows, vocabulary = evidence.rows, evidence.vocabulary
    fires_N = evidence.acts_N > 0
    if not fires_N.any():
        return Explanation.none("it does not fire")
    polarity_V = vocabulary.polarity_V
    polarity_N = polarity_V[rows.token_N]
    documents = int(rows.document_N.max()) + 1
    fired_D = np.bincount(rows.document_N[fires_N], minlength=documents).astype(np.float64)
    summed_D = np.bincount(rows.document_N[fires_N], polarity_N[fires_N], documents).astype(np.float64)
    difference, p = (float(found[0]) for found in polarity_test(summed_D[:, None], fired_D[:, None], polarity_N.mean()))
    if abs(difference) < MIN_POLARITY or p > ALPHA:
        return Explanation.none(f"no polarity: {difference:+.2f} beside all tokens, p = {p:.2g}")
    sign = np.sign(difference)
    share = vocabulary.in_lexicon_V[rows.token_N[fires_N]].mean()

    def predict(window: Window) -> NDArray[np.floating]:
        return np.maximum(sign * polarity_V[window.ids], 0)

    words = "positive" if sign > 0 else "negative"
    return Explanation(
        f"fires on {words} words: mean polarity {difference:+.2f} beside all tokens, {share:.0%} in the lexicon",
        predict=predict,
    )


def polarity_test(
    summed_DF: NDArray[np.floating], fired_DF: NDArray[np.floating], background: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean polarity where each latent fires, less that of all tokens [F], and its two-sided p [F]; nan where it never fires.

    Args:
        summed_DF: polarity summed over the tokens of each document where the latent fires; fired_DF: the number of these.
    """
    total_F = np.where(fired_DF.any(0), fired_DF.sum(0), np.nan)
    mean_F = summed_DF.sum(0) / total_F
    error_F = np.sqrt(np.square(summed_DF - mean_F * fired_DF).sum(0)) / total_F
    difference_F = mean_F - background
    certain_F = np.where(difference_F == 0, 1.0, 0.0)  # where no document differs from another
    with np.errstate(divide="ignore", invalid="ignore"):
        return difference_F, np.where(error_F == 0, certain_F, 2 * norm.sf(np.abs(difference_F) / error_F))
