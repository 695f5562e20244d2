"""What an explanation is, and what those that make and judge explanations must offer.

An explanation is a text for people; an executable one also predicts how strongly the latent fires at each token of a window, so
that it is judged without a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    predict: Callable[[Window], NDArray[np.floating]] | None = None
    """Predicted activation [T] at the tokens of a window, from its tokens alone; none where there is only a text."""

    @classmethod
    def none(cls, why: str) -> Explanation:
        return cls("", why)


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


Explainer = Callable[["Evidence"], Explanation]
"""Says what makes a latent fire, from training documents alone."""
Judge = Callable[[Explanation, Sequence[Window], Sequence[Window], int], Score]
"""Scores an explanation on held-out windows in which the latent fires and in which it does not, with a seed."""
