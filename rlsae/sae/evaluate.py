"""How good a dictionary is, on rows and documents that did not train it.

Shapes: B rows, T positions, N tokens, D channels, F latents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlsae.activations.extract import length_buckets, padded
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.models import Hook, load, replace_output
from rlsae.sae.dictionary import SparseAutoencoder

ROWS = 8192
"""Rows that are encoded at once."""
CE_DOCUMENTS = 128
"""Held-out documents of `recovered`."""
DENSE = 0.1
"""Share of rows above which a latent counts as dense."""
OUTLIER = 10
"""Times the median norm above which a row counts as an outlier."""


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
    rows, active, total, cosine, error = 0, 0, 0.0, 0.0, 0.0
    squares, squares_of_decoded, products = 0.0, 0.0, 0.0
    sum_D, sum_of_decoded_D = torch.zeros(2, sae.channels, dtype=torch.float64, device=where)
    firings_F = torch.zeros(sae.latents, dtype=torch.int64, device=where)
    norms = []
    for _, acts_BD in held_out_batches(store, layer, where):
        latents_BF = sae.encode(acts_BD)
        decoded_BD = sae.decode(latents_BF)
        error += (decoded_BD - acts_BD).double().square().sum().item()
        cosine += F.cosine_similarity(decoded_BD, acts_BD).double().sum().item()
        acts_BD, decoded_BD = acts_BD.double(), decoded_BD.double()
        sum_D += acts_BD.sum(0)
        sum_of_decoded_D += decoded_BD.sum(0)
        squares += acts_BD.square().sum().item()
        squares_of_decoded += decoded_BD.square().sum().item()
        products += (decoded_BD * acts_BD).sum().item()
        firings_F += (latents_BF > 0).sum(0)
        active += int(torch.count_nonzero(latents_BF))
        total += latents_BF.double().sum().item()
        norms.append(acts_BD.norm(dim=1))
        rows += len(acts_BD)
    fvu = error / (squares - float(sum_D.square().sum()) / rows)
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
    return scores, density_F


@torch.inference_mode()
def recovered(
    saes: list[SparseAutoencoder], weights: Path, tokens_folder: Path, layer: int, hook: Hook, where: torch.device
) -> list[dict[str, float]]:
    """How well each dictionary serves the model when its reconstruction replaces the hooked output.

    `ce_recovered` = (CE_zero - CE_sae) / (CE_zero - CE_clean) of the next-token loss, `kl_recovered` = 1 - KL_sae / KL_zero of
    KL(clean ‖ replaced) of the next token's distribution: 1 is as good as the original, 0 no better than zeros. Measured on
    the first held-out documents.
    """
    tokens = Tokens.open(tokens_folder)
    model, _ = load(weights, where)
    documents = np.flatnonzero(tokens.held_out)[:CE_DOCUMENTS]
    replacements = [torch.zeros_like, *(_reconstruction(sae) for sae in saes)]
    clean, replaced, divergence = 0.0, np.zeros(len(replacements)), np.zeros(len(replacements))
    for batch in length_buckets(tokens, documents.tolist()):
        ids_BT = padded(tokens, batch).to(where)
        lengths_B = torch.tensor([len(tokens.ids(document)) for document in batch], device=where)
        real_BT = torch.arange(1, ids_BT.shape[1], device=where) < lengths_B[:, None]
        next_N = ids_BT[:, 1:][real_BT]
        clean_NV = _logits(model, ids_BT, real_BT)
        clean += F.cross_entropy(clean_NV, next_N, reduction="sum").item()
        log_p_NV = clean_NV.log_softmax(1)
        for number, function in enumerate(replacements):
            with replace_output(model, layer, hook, function):
                logits_NV = _logits(model, ids_BT, real_BT)
            replaced[number] += F.cross_entropy(logits_NV, next_N, reduction="sum").item()
            log_q_NV = logits_NV.log_softmax(1)
            divergence[number] += F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True).item()
    return [
        {
            "ce_recovered": float((replaced[0] - loss) / (replaced[0] - clean)),
            "kl_recovered": float(1 - kl / divergence[0]),
        }
        for loss, kl in zip(replaced[1:], divergence[1:], strict=True)
    ]


def _reconstruction(sae: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    return lambda acts_BTD: sae.decode(sae.encode(acts_BTD.flatten(0, 1))).view_as(acts_BTD)


def _logits(model: PreTrainedModel, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Logits [N, V] of the N tokens that follow another one."""
    return model(input_ids=ids_BT, use_cache=False).logits[:, :-1][real_BT].float()
