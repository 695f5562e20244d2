"""`tokens`: the tokens at which a latent fires most strongly on average. Shapes: N rows, V tokens."""

from __future__ import annotations

import numpy as np

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation

TOKENS = 8
"""Tokens named."""
MIN_COUNT = 5
"""Occurrences below which a token's mean activation says little."""
WEAK = 0.1
"""Share of the strongest token's mean activation below which a token is not named."""


def explain(evidence: Evidence) -> Explanation:
    """Names tokens that are often enough seen and not weak beside the first, and predicts their mean activation."""
    token_N = evidence.rows.token_N
    count_V = np.bincount(token_N, minlength=len(evidence.vocabulary))
    mean_V = np.bincount(token_N, evidence.acts_N, len(evidence.vocabulary)) / np.maximum(count_V, 1)
    mean_V[count_V < MIN_COUNT] = 0
    order = np.argsort(-mean_V, kind="stable")[:TOKENS]
    named = order[mean_V[order] > WEAK * mean_V[order[0]]]
    if not len(named):
        return Explanation.none("no token fires it often enough")
    predicted_V = np.zeros_like(mean_V)
    predicted_V[named] = mean_V[named]
    return Explanation(f"fires on {evidence.vocabulary.named(named)}", predict=lambda window: predicted_V[window.ids])
