"""What explainers see of a latent: where it fires in training documents, and what it writes. Shapes: N rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsae.interpretation.labels import Kind, Labelled
from rlsae.interpretation.positions import Positions, Vocabulary
from rlsae.interpretation.windows import Window


@dataclass(frozen=True)
class Evidence:
    """One latent in training documents."""

    rows: Positions
    kinds: dict[str, Kind]
    labels: dict[str, Labelled]
    """Of the rows."""
    acts_N: NDArray[np.float32]
    """Its activation at each of the rows."""
    active: list[Window]
    silent: list[Window]
    """Windows where it fires, from all quantiles, and where it does not."""
    raised: NDArray[np.int64]
    lowered: NDArray[np.int64]
    """Tokens whose logits its direction raises and lowers most, strongest first."""
    vocabulary: Vocabulary
