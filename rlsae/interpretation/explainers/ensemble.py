"""`ensemble`: what several explainers say together, each weighed by how well it predicts training windows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.windows import Window

ALIKE = ("tokens", "ngram")
"""Explainers that name the same tokens: the better one speaks."""
NAMED = 0.25
"""Share of the largest weight from which an explainer's words are taken over."""


def combine(explanations: Mapping[str, Explanation], evidence: Evidence) -> Explanation:
    """Sum of the predictions, each in units of its spread on training windows, weighed by its correlation with the activation.

    Args:
        explanations: of the same latent, by explainer; those that are not executable take no part.
    """
    able = {name: said for name, said in explanations.items() if said.predict}
    windows = [*evidence.active, *evidence.silent]
    true = np.concatenate([window.acts for window in windows]) if windows else np.zeros(1)
    weights, scales = {}, {}
    for name, said in able.items():
        predicted = np.concatenate([said.predict(window) for window in windows]) if windows else np.zeros(1)  # type: ignore
        if predicted.std() and true.std():
            weights[name], scales[name] = float(np.corrcoef(predicted, true)[0, 1]), float(predicted.std())
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        return Explanation.none("no explainer predicts its training windows")

    def predict(window: Window) -> NDArray[np.floating]:
        return sum(weight * able[name].predict(window) / scales[name] for name, weight in weights.items())  # type: ignore

    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    spoken = [name for name in ranked if weights[name] >= NAMED * weights[ranked[0]]]
    for other in [name for name in spoken if name in ALIKE][1:]:
        spoken.remove(other)
    return Explanation("; ".join(able[name].text for name in spoken), predict=predict)
