"""Does a tag recur in the dictionary of another seed?

A p-value holds for one code: that another training would have found the same latent is not part of it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlsae.comparison.kinds import CHANGED

RECURS = 0.7
"""Decoder cosine from which two latents count as the same."""


def replicated(tags: dict[int, NDArray[np.str_]], decoders: dict[int, NDArray[np.floating]]) -> dict[int, pd.Series]:
    """Whether each tagged latent is near a tagged latent of another seed; null for the others, and with one seed for all.

    Args:
        tags: tag of each latent [F], by seed.
        decoders: unit directions [F, D], by seed.
    """
    tagged = {seed: np.isin(tag, CHANGED) for seed, tag in tags.items()}
    found = {}
    for seed, own in tagged.items():
        values = pd.Series(pd.NA, index=range(len(own)), dtype="boolean")
        others = [decoders[other][tagged[other]] for other in tagged if other != seed]
        if others:
            cosines = decoders[seed][own] @ np.concatenate(others).T
            values[own] = (cosines >= RECURS).any(1)
        found[seed] = values
    return found
