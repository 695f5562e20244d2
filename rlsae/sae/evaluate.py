"""How good a dictionary is, on rows and documents that did not train it.

Shapes: B rows, T positions, N tokens, M documents, D channels, F latents, V vocabulary, R replacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlsae.activations.extract import length_buckets, padded
from rlsae.activations.joint import join
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.beside import OtherRows, beside
from rlsae.models import Hook, computed_once, load, replace_output
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.statistics import OUTLIER

Array = NDArray[np.float64]
ROWS = 8192
"""Rows that are encoded at once."""
CE_DOCUMENTS = 128
"""Held-out documents on which replacements are measured."""
DENSE = 0.1
"""Share of rows above which a latent counts as dense."""


def held_out_batches(store: ActivationStore, layer: int, where: torch.device) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Row numbers and rows [B, D] of the held-out documents, in the order of the store."""
    held_out = store.held_out_rows()
    for first in range(0, store.rows, ROWS):
        numbers = first + np.flatnonzero(held_out[first : first + ROWS])
        if len(numbers):
            batch = store.read(layer, first, first + ROWS)[numbers - first]
            yield numbers, torch.from_numpy(batch).to(where, torch.float32)


@torch.inference_mode()
def held_out_quality(
    sae: SparseAutoencoder, store: ActivationStore, layer: int, where: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Scores on the held-out rows; every sum runs over all rows before a division, in float64. docs/dictionaries.md.

    Returns:
        the scores, and the share of rows at which each latent is active [F].
    """
    rows, active, total, cosine = 0, 0, 0.0, 0.0
    squares_of_decoded, products = 0.0, 0.0
    sum_D, sum_of_decoded_D, error_D, square_D = torch.zeros(4, sae.channels, dtype=torch.float64, device=where)
    firings_F = torch.zeros(sae.latents, dtype=torch.int64, device=where)
    norms = []
    for _, acts_BD in held_out_batches(store, layer, where):
        latents_BF = sae.encode(acts_BD)
        decoded_BD = sae.decode(latents_BF)
        error_D += (decoded_BD - acts_BD).double().square().sum(0)
        cosine += F.cosine_similarity(decoded_BD, acts_BD).double().sum().item()
        acts_BD, decoded_BD = acts_BD.double(), decoded_BD.double()
        sum_D += acts_BD.sum(0)
        sum_of_decoded_D += decoded_BD.sum(0)
        square_D += acts_BD.square().sum(0)
        squares_of_decoded += decoded_BD.square().sum().item()
        products += (decoded_BD * acts_BD).sum().item()
        firings_F += (latents_BF > 0).sum(0)
        active += int(torch.count_nonzero(latents_BF))
        total += latents_BF.double().sum().item()
        norms.append(acts_BD.norm(dim=1))
        rows += len(acts_BD)
    variance_D = square_D - sum_D.square() / rows
    fvu = float(error_D.sum() / variance_D.sum())
    mean_D = sum_D / rows
    length = squares_of_decoded - float(mean_D @ (2 * sum_of_decoded_D - sum_D))
    overlap = products - float(mean_D @ sum_of_decoded_D)
    norm_N, density_F = torch.cat(norms), firings_F.double() / rows
    scores = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": active / rows,
        "l1": total / rows,
        "cosine": cosine / rows,
        "shrinkage": 1 - length / overlap if overlap else 1.0,
        "dead_share": float((density_F == 0).double().mean()),
        "dense_share": float((density_F > DENSE).double().mean()),
        "outlier_share": float((norm_N > OUTLIER * norm_N.median()).double().mean()),
        "rows_held_out": rows,
    }
    if sae.reads == "both":
        halves = zip(("base", "tuned"), error_D.chunk(2), variance_D.chunk(2), strict=True)
        scores |= {f"fvu_{role}": float(error_D.sum() / variance_D.sum()) for role, error_D, variance_D in halves}
    return scores, density_F


@dataclass(frozen=True)
class ReplacementCosts:
    """What replacements of a hooked output cost a model, summed over the tokens of each document."""

    clean_M: Array
    """Next-token loss of the model as it is."""
    loss_RM: Array
    """The same with each replacement; the first is by zeros."""
    divergence_RM: Array
    """KL(clean ‖ replaced) of the next token's distribution."""

    def recovered(self, weights_XM: Array) -> dict[str, Array]:
        """`ce_recovered` and `kl_recovered` [X, R - 1] of all but zeros, where document m counts weights[x, m] times.

        (CE_zero - CE) / (CE_zero - CE_clean) and 1 - KL / KL_zero: 1 is as good as the original, 0 no better than zeros.
        """
        clean_X = weights_XM @ self.clean_M
        loss_RX, divergence_RX = self.loss_RM @ weights_XM.T, self.divergence_RM @ weights_XM.T
        return {
            "ce_recovered": ((loss_RX[0] - loss_RX[1:]) / (loss_RX[0] - clean_X)).T,
            "kl_recovered": (1 - divergence_RX[1:] / divergence_RX[0]).T,
        }


@torch.inference_mode()
def replacement_costs(
    replacements: Sequence[Callable[[Tensor], Tensor]], model: PreTrainedModel, tokens: Tokens, layer: int, hook: Hook
) -> ReplacementCosts:
    """Costs on the first held-out documents of zeros, and of each replacement of the hooked output acts_BTD."""
    documents = np.flatnonzero(tokens.held_out)[:CE_DOCUMENTS]
    tokens = replace(tokens, token=tokens.token[: tokens.start[documents[-1] + 1]])  # in one read
    replacements = [torch.zeros_like, *replacements]
    clean_M = np.zeros(len(documents))
    loss_RM, divergence_RM = np.zeros((2, len(replacements), len(documents)))
    lengths = np.diff(tokens.start)
    for batch in length_buckets(tokens, documents.tolist()):
        places, ids_BT = np.searchsorted(documents, batch), padded(tokens, batch).to(model.device)
        lengths_B = torch.from_numpy(lengths[batch]).to(model.device)
        real_BT = torch.arange(1, ids_BT.shape[1], device=model.device) < lengths_B[:, None]
        next_N = ids_BT[:, 1:][real_BT]
        with computed_once(model, layer):
            log_p_NV = _log_probabilities(model, ids_BT, real_BT)
            clean_M[places] = _by_document(F.nll_loss(log_p_NV, next_N, reduction="none"), real_BT)
            for number, function in enumerate(replacements):
                with replace_output(model, layer, hook, function):
                    log_q_NV = _log_probabilities(model, ids_BT, real_BT)
                loss_RM[number, places] = _by_document(F.nll_loss(log_q_NV, next_N, reduction="none"), real_BT)
                kl_N = F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(1)
                divergence_RM[number, places] = _by_document(kl_N, real_BT)
    return ReplacementCosts(clean_M, loss_RM, divergence_RM)


def recovered(
    saes: list[SparseAutoencoder], weights: Path, tokens_folder: Path, layer: int, hook: Hook, where: torch.device,
    base_weights: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """How well each dictionary serves its own model when its reconstruction replaces the hooked output.

    Args:
        base_weights: of the base, which runs beside the tuned model for dictionaries that read the rows of both; what they
            reconstruct are the tuned model's rows.
    """
    (model, _), tokens = load(weights, where), Tokens.open(tokens_folder)
    if base_weights is None:
        costs = replacement_costs([reconstruction(sae) for sae in saes], model, tokens, layer, hook)
    else:
        with beside(model, load(base_weights, where)[0], layer, hook) as base:
            costs = replacement_costs([joint_reconstruction(sae, base) for sae in saes], model, tokens, layer, hook)
    scores = costs.recovered(np.ones((1, len(costs.clean_M))))
    return [{name: float(values[0, number]) for name, values in scores.items()} for number in range(len(saes))]


def reconstruction(sae: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    """x̂ of rows acts_BTD."""
    return lambda acts_BTD: sae.decode(sae.encode(acts_BTD.flatten(0, 1))).view_as(acts_BTD)


def joint_reconstruction(sae: SparseAutoencoder, base: OtherRows) -> Callable[[Tensor], Tensor]:
    """The tuned model's part of x̂ of both models' rows; x_base + x̂ of a difference."""

    def function(acts_BTD: Tensor) -> Tensor:
        base_ND = base.acts_BTD.flatten(0, 1)
        decoded_NE = sae.decode(sae.encode(join(sae.reads, base_ND, acts_BTD.flatten(0, 1))))
        tuned_ND = decoded_NE.chunk(2, 1)[1] if sae.reads == "both" else base_ND + decoded_NE
        return tuned_ND.view_as(acts_BTD)

    return function


def _log_probabilities(model: PreTrainedModel, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Of the N tokens that follow another one [N, V]."""
    return model(input_ids=ids_BT, use_cache=False).logits[:, :-1][real_BT].float().log_softmax(1)


def _by_document(values_N: Tensor, real_BT: Tensor) -> Array:
    """Sums [B] of the values of each document's tokens."""
    grid_BT = torch.zeros(real_BT.shape, dtype=torch.float64, device=real_BT.device)
    return grid_BT.masked_scatter(real_BT, values_N.double()).sum(1).cpu().numpy()
