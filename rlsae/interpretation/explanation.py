"""What an explanation is, and what those that make and judge explanations must offer.

An explanation is a text for people; an executable one also predicts how strongly the latent fires at each token of any
tokens, so that it is judged without a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.windows import Window

if TYPE_CHECKING:
    from rlsae.interpretation.evidence import Evidence

EXPLAINED = "explained"
SCORED = "scored"


@dataclass(frozen=True)
class Explanation:
    """What one explainer says of one latent."""

    text: str
    """Empty where the status is not `explained`."""
    status: str = EXPLAINED
    """Or why there is none."""
    predict: Callable[[NDArray[np.int64]], NDArray[np.floating]] | None = None
    """Predicted activation at each of some consecutive tokens, given their ids [T] → [T]; none if it is a text alone."""


@dataclass(frozen=True)
class Score:
    """What one judge finds of one explanation on held-out windows."""

    value: float
    """nan where the status is not `scored`."""
    low: float
    high: float
    """95 % bootstrap interval over windows."""
    status: str = SCORED

    @classmethod
    def none(cls, why: str) -> Score:
        return cls(float("nan"), float("nan"), float("nan"), why)


class Explainer(Protocol):
    """Says what makes a latent fire, from training documents alone."""

    def explain(self, evidence: Evidence) -> Explanation: ...


class Judge(Protocol):
    """Scores an explanation on windows that its explainer has not seen."""

    def score(self, explanation: Explanation, active: Sequence[Window], silent: Sequence[Window], seed: int) -> Score: ...
