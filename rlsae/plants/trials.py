"""The trials that prove the comparison: which plants, which dictionaries, which seeds. Light, for the workflow reads it.

The truth seeds are not those on which the rule of the test was chosen (docs/method-change.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlsae.errors import RlsaeError

VARIATIONS: dict[str, dict[str, Any]] = {
    "rest": {},
    "bulk-15": {"drift": 15.0},
    "map-4": {"linear_share": 0.1},
    "map-8-bulk-8": {"linear_share": 0.1, "linear_rank": 8, "drift": 8.0},
    "map-16-bulk-15": {"linear_share": 0.1, "linear_rank": 16, "drift": 15.0},
}
"""Settings of the plant (`rlsae.plants.plant.Plant`) by name: single directions change, and the bulk moves in five ways."""
NULL = "null-"
"""Beginning of the names of the same variations in which no single direction changes."""
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "batchtopk": {"k": 8},
    "relu": {"l1": 0.1},
    "tied_relu": {"l1": 0.02},
}
"""What each architecture's dictionaries have of their own; their sparsity was not tuned on these plants."""
SHARED: dict[str, Any] = {"expansion": 8.0, "epochs": 4, "learning_rate": 1e-2, "seeds": [0, 1]}
MAIN = "topk"
SEEDS = (3, 4, 5, 6, 7)
FEW_SEEDS = SEEDS[:3]
"""For nulls and smaller plants."""
DOCUMENTS = 2000
"""Of 100 rows each."""
FEWER_DOCUMENTS = (250, 500, 1000)


@dataclass(frozen=True)
class Trial:
    """One pair of models, and the dictionaries that look at it."""

    architecture: str
    variation: str
    documents: int
    seed: int
    """Of the truth."""

    def __post_init__(self) -> None:
        known = [null + name for null in ("", NULL) for name in VARIATIONS]
        for key, given, names in (("architecture", self.architecture, list(RECIPES)), ("variation", self.variation, known)):
            if given not in names:
                raise RlsaeError(f"{key}: expected one of {', '.join(names)}, found {given!r}")

    @property
    def path(self) -> str:
        """Of its folder below `results/plants`."""
        return f"{self.architecture}/{self.variation}/documents{self.documents}/seed{self.seed}"


def all_trials() -> list[Trial]:
    """The main architecture on every plant, null and number of rows; the others on every plant of one seed."""
    found = [Trial(MAIN, name, DOCUMENTS, seed) for name in VARIATIONS for seed in SEEDS]
    found += [Trial(MAIN, NULL + name, DOCUMENTS, seed) for name in VARIATIONS for seed in FEW_SEEDS]
    found += [Trial(MAIN, "rest", documents, seed) for documents in FEWER_DOCUMENTS for seed in FEW_SEEDS]
    others = [architecture for architecture in RECIPES if architecture != MAIN]
    return found + [Trial(other, name, DOCUMENTS, SEEDS[0]) for other in others for name in VARIATIONS]
