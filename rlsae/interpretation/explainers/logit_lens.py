"""`logit_lens`: the tokens that a latent's direction makes more likely (nostalgebraist 2020; arXiv 2501.08319).

An explanation of the output: it predicts that the latent fires where one of these tokens comes next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.windows import Window


def explain(evidence: Evidence) -> Explanation:
    """Names the tokens raised and lowered most, and predicts 1 before a raised one."""

    if not len(evidence.raised):
        return Explanation.none("it does not write to the residual stream")

    def predict(window: Window) -> NDArray[np.floating]:
        return np.append(np.isin(window.ids[1:], evidence.raised), False).astype(float)

    raised, lowered = (evidence.vocabulary.named(tokens) for tokens in (evidence.raised, evidence.lowered))
    return Explanation(f"raises {raised}, lowers {lowered}", predict=predict)
