"""`ensemble`: what several explainers say together, each weighed by how well it tells training windows apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.judges import predicted_largest, ranking_auc
from rlsae.interpretation.windows import Window

NAMED = 0.25
"""Share of the largest weight from which an explainer's words are taken over."""


def combine(explanations: Mapping[str, Explanation], evidence: Evidence) -> Explanation:
    """Sum of the predictions, each in units of its largest on training windows, with weights 2 AUC - 1 where that is positive.

    Args:
        explanations: of the same latent, by explainer; those that are not executable take no part.
    """
    able = {name: said for name, said in explanations.items() if said.predict}
    weights, scales = {}, {}
    for name, said in able.items():
        active, silent = (predicted_largest(said, windows) for windows in (evidence.active, evidence.silent))
        if len(active) and len(silent) and max(active.max(), silent.max()) > 0:
            weights[name] = 2 * ranking_auc(active, silent) - 1
            scales[name] = max(active.max(), silent.max())
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        return Explanation.none("no explainer tells its training windows apart")

    def predict(window: Window) -> NDArray[np.floating]:
        return sum(weight * able[name].predict(window) / scales[name] for name, weight in weights.items())  # type: ignore

    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    texts = [able[name].text for name in ranked if weights[name] >= NAMED * weights[ranked[0]]]
    return Explanation("; ".join(texts), predict=predict)
