"""What a dictionary is worth to the other model: base and tuned dictionaries on the rows of both, and inside both models.

Shapes: N rows, M documents, D channels, S dictionaries, X resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.comparison.members import ROLES, Key
from rlsae.models import load
from rlsae.progress import Progress
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_batches, reconstruction, replacement_costs
from rlsae.statistics import bootstrap_weights

SCORES = {"fvu": "on", "ce_recovered": "in", "kl_recovered": "in"}
"""Measured `on` the rows of a policy, or `in` its model; docs/dictionaries.md defines them."""
KEY = ["layer", "dictionary", "seed", "role"]
Array = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Transfer:
    """Scores of every dictionary of a study with both policies."""

    aggregates: list[Row]
    """Rows of `aggregates.parquet`, means over seeds: `fvu_base_on_tuned` is that of the base's dictionaries on tuned rows."""
    by_seed: pd.DataFrame
    """Scores by layer, dictionary, seed and role: with the policy of that role and, as `fvu_other`, with the other one."""

    def figures(self, layer: int, name: str) -> Row:
        """Entries of the manifest of one layer and dictionary."""
        found: Row = {}
        for row in self.aggregates:
            if (row["layer"], row["dictionary"]) == (layer, name):
                value, interval = row["value"], [row["ci_low"], row["ci_high"]]
                known = all(map(math.isfinite, [value, *interval]))
                found |= {row["measure"]: value if known else None, f"{row['measure']}_ci95": interval if known else None}
        return found


def transfer(
    folders: dict[Key, Path], stores: dict[str, ActivationStore], weights: dict[str, Path], tokens: Path, where: torch.device
) -> Transfer:
    """Score every dictionary on the held-out rows and inside the model of both policies, one model in memory at a time.

    Args:
        stores: activations by role; weights: transformers folders by role.
        tokens: tokens artifact of the stores.
    """
    text, aggregates, by_seed = Tokens.open(tokens), [], []
    progress = Progress("transfer", len(ROLES) * len(folders), "dictionaries")
    for policy in ROLES:
        model, _ = load(weights[policy], where)
        for layer in dict.fromkeys(layer for _, layer, _, _ in folders):
            of_layer = {key: path for key, path in folders.items() if key[1] == layer}
            saes = [SparseAutoencoder.load(path).to(where) for path in of_layer.values()]
            scores = _scores(saes, stores[policy], model, text, layer, where)
            for number, (role, _, name, seed) in enumerate(of_layer):
                values = {score: float(values_XS[0, number]) for score, values_XS in scores.items()}
                key = {"layer": layer, "dictionary": name, "seed": seed, "role": role}
                by_seed.append({**key, "own": role == policy, **values})
            for role, name in dict.fromkeys((role, name) for role, _, name, _ in of_layer):
                seeds = [number for number, (of, _, dictionary, _) in enumerate(of_layer) if (of, dictionary) == (role, name)]
                for score, values_XS in scores.items():
                    mean_X = values_XS[:, seeds].mean(1)
                    low, high = np.quantile(mean_X[1:], [0.025, 0.975])
                    key = {"layer": layer, "dictionary": name, "measure": f"{score}_{role}_{SCORES[score]}_{policy}"}
                    aggregates.append({**key, "value": float(mean_X[0]), "ci_low": float(low), "ci_high": float(high)})
            progress.update(len(of_layer))
    table = pd.DataFrame(by_seed, columns=[*KEY, "own", *SCORES]).set_index(KEY)
    own_scores, other_scores = (table.loc[table.own == own, list(SCORES)] for own in (True, False))
    return Transfer(aggregates, own_scores.join(other_scores, rsuffix="_other"))


def _scores(
    saes: list[SparseAutoencoder],
    store: ActivationStore,
    model: PreTrainedModel,
    text: Tokens,
    layer: int,
    where: torch.device,
) -> dict[str, Array]:
    """Each score [X, S] of the dictionaries with one policy: as measured, then in resamples of the documents."""
    variance_M, error_SM = squared_errors(saes, store, layer, where)
    costs = replacement_costs([reconstruction(sae) for sae in saes], model, text, layer, store.group.attrs["hook"])
    weights_XM = _once_and_resampled(len(variance_M))
    fvu_XS = weights_XM @ error_SM.T / (weights_XM @ variance_M)[:, None]
    return {"fvu": fvu_XS, **costs.recovered(_once_and_resampled(len(costs.clean_M)))}


@torch.inference_mode()
def squared_errors(
    saes: list[SparseAutoencoder], store: ActivationStore, layer: int, where: torch.device
) -> tuple[Array, Array]:
    """Σ‖x - μ‖² [M] and, of each dictionary, Σ‖x - x̂‖² [S, M] over the held-out rows of each document; μ is their mean."""
    held_out = store.held_out_rows()
    _, document_N = np.unique(store.group["document"][:][held_out], return_inverse=True)
    sum_D = torch.zeros(store.acts(layer).shape[1], dtype=torch.float64, device=where)
    for _, acts_BD in held_out_batches(store, layer, where):
        sum_D += acts_BD.double().sum(0)
    squares = []
    for _, acts_BD in held_out_batches(store, layer, where):
        decoded = [sae.decode(sae.encode(acts_BD)) for sae in saes]
        residuals = [acts_BD - sum_D / held_out.sum(), *(acts_BD - decoded_BD for decoded_BD in decoded)]
        squares.append(torch.stack([residual_BD.double().square().sum(1) for residual_BD in residuals]).cpu().numpy())
    sums = [np.bincount(document_N, weights=squares_N) for squares_N in np.concatenate(squares, axis=1)]
    return np.asarray(sums[0], float), np.asarray(sums[1:], float)


@cache
def _once_and_resampled(documents: int) -> Array:
    """How often each document counts: once, then as drawn in each bootstrap resample."""
    return np.vstack([np.ones(documents), bootstrap_weights(documents)])
