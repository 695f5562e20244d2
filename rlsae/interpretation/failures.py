"""Where an explanation is wrong: the held-out windows that it predicts worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.judges import predicted_largest
from rlsae.interpretation.windows import Window

MISSED = "missed"
FALSE_ALARM = "false alarm"


def failures(said: Mapping[str, Explanation], active: Sequence[Window], silent: Sequence[Window]) -> Iterator[dict[str, Any]]:
    """Of each executable explanation, the window that it predicts lowest of those in which the latent fires (`missed`), and
    the one that it predicts higher, and highest of the others (`false alarm`); neither where it ranks all windows rightly.

    Yields:
        `explainer`, `failure`, `document`, `tokens`, `activations` and `predictions` [T] of the window.
    """
    for explainer, explanation in said.items():
        if explanation.predict is None or not active or not silent:
            continue
        high, low = predicted_largest(explanation, active), predicted_largest(explanation, silent)
        worst = [(MISSED, active[int(high.argmin())])] if high.min() <= low.max() else []
        worst += [(FALSE_ALARM, silent[int(low.argmax())])] if high.min() < low.max() else []
        for failure, window in worst:
            yield {
                "explainer": explainer,
                "failure": failure,
                "document": window.document,
                "tokens": list(window.tokens),
                "activations": window.acts.tolist(),
                "predictions": np.asarray(explanation.predict(window), np.float64).tolist(),
            }
