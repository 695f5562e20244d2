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
EPOCHS = 4
"""Over the rows, of every dictionary; those trained by stages divide them between their stages."""
SHARED: dict[str, Any] = {"expansion": 8.0, "learning_rate": 1e-2, "seeds": [0, 1]}
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 8},
    "batchtopk": {"architecture": "batchtopk", "k": 8},
    "relu": {"architecture": "relu", "l1": 0.1},
    "tied_relu": {"architecture": "tied_relu", "l1": 0.02},
    "crosscoder_topk": {"architecture": "topk", "k": 8, "reads": "both"},
    "crosscoder_batchtopk": {"architecture": "batchtopk", "k": 8, "reads": "both"},
    "crosscoder_relu": {"architecture": "relu", "l1": 0.1, "reads": "both"},
    "crosscoder_relu_shared": {"architecture": "relu", "l1": 0.1, "reads": "both", "shared_share": 0.25},
    "difference_topk": {"architecture": "topk", "k": 8, "reads": "difference"},
    "stagewise_topk": {"architecture": "topk", "k": 8},
}
"""Dictionaries by the name of the method; their sparsity was not tuned on these plants."""
STAGEWISE = "stagewise_topk"
"""Trained on the base first and then on the tuned model, by way of the new data or of the new model."""
MAIN = "topk"
PAIRS = ("topk", "batchtopk", "relu", "tied_relu")
METHODS = tuple(name for name in RECIPES if name not in ("relu", "tied_relu"))
"""Those that the table of methods compares (docs/methods.md)."""
METHOD_VARIATIONS = ("rest", "map-4", NULL + "rest", NULL + "map-4")
SEEDS = (3, 4, 5, 6, 7)
FEW_SEEDS = SEEDS[:3]
"""For nulls, smaller plants, and methods."""
DOCUMENTS = 2000
"""Of 100 rows each."""
FEWER_DOCUMENTS = (250, 500, 1000)


@dataclass(frozen=True)
class Trial:
    """One pair of models, and the dictionaries that look at it."""

    method: str
    variation: str
    documents: int
    seed: int
    """Of the truth."""

    def __post_init__(self) -> None:
        known = [null + name for null in ("", NULL) for name in VARIATIONS]
        for key, given, names in (("method", self.method, list(RECIPES)), ("variation", self.variation, known)):
            if given not in names:
                raise RlsaeError(f"{key}: expected one of {', '.join(names)}, found {given!r}")

    @property
    def path(self) -> str:
        """Of its folder below `results/plants`."""
        return f"{self.method}/{self.variation}/documents{self.documents}/seed{self.seed}"


def all_trials() -> list[Trial]:
    """The main pair on every plant, null and number of rows; the other pairs on every plant of one seed; every method on
    some plants and nulls of several."""
    found = [Trial(MAIN, name, DOCUMENTS, seed) for name in VARIATIONS for seed in SEEDS]
    found += [Trial(MAIN, NULL + name, DOCUMENTS, seed) for name in VARIATIONS for seed in FEW_SEEDS]
    found += [Trial(MAIN, "rest", documents, seed) for documents in FEWER_DOCUMENTS for seed in FEW_SEEDS]
    found += [Trial(other, name, DOCUMENTS, SEEDS[0]) for other in PAIRS if other != MAIN for name in VARIATIONS]
    found += [Trial(method, name, DOCUMENTS, seed) for method in METHODS for name in METHOD_VARIATIONS for seed in FEW_SEEDS]
    return list(dict.fromkeys(found))
