"""How good a dictionary is, on rows and documents that did not train it. Shapes: B rows, T positions, D channels, F latents."""

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
"""Held-out documents of `ce_recovered`."""


def held_out_batches(store: ActivationStore, layer: int, where: torch.device) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Row numbers and rows [B, D] of the held-out documents, in the order of the store."""
    held_out = store.held_out_rows()
    for first in range(0, store.rows, ROWS):
        numbers = first + np.flatnonzero(held_out[first : first + ROWS])
        if len(numbers):
            batch = store.read(layer, first, first + ROWS)[numbers - first]
            yield numbers, torch.from_numpy(batch).to(where, torch.float32)


def held_out_quality(sae: SparseAutoencoder, store: ActivationStore, layer: int, where: torch.device) -> dict[str, float]:
    """Scores on the held-out rows.

    `fvu` = Σ‖x - x̂‖² / Σ‖x - mean‖², both sums over all rows before the division; `explained_variance` = 1 - fvu; `l0` =
    mean number of active latents; `dead_share` = share of latents that no held-out row activates.
    """
    rows, active = 0, 0
    error, total_D, squares = 0.0, torch.zeros(sae.W_dec_FD.shape[1], dtype=torch.float64, device=where), 0.0
    fired_F = torch.zeros(sae.latents, dtype=torch.bool, device=where)
    for _, acts_BD in held_out_batches(store, layer, where):
        latents_BF = sae.encode(acts_BD)
        error += (sae.decode(latents_BF) - acts_BD).double().square().sum().item()
        total_D += acts_BD.double().sum(0)
        squares += acts_BD.double().square().sum().item()
        fired_F |= (latents_BF > 0).any(0)
        active += int(torch.count_nonzero(latents_BF))
        rows += len(acts_BD)
    variance = squares - float(total_D.square().sum()) / rows
    fvu = error / variance
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": active / rows,
        "dead_share": 1 - float(fired_F.double().mean()),
        "rows_held_out": rows,
    }


@torch.inference_mode()
def ce_recovered(
    saes: list[SparseAutoencoder], weights: Path, tokens_folder: Path, layer: int, hook: Hook, where: torch.device
) -> list[float]:
    """(CE_zero - CE_sae) / (CE_zero - CE_clean) of each dictionary: next-token loss when it replaces the hooked output.

    1 means that the reconstruction serves the model as well as the original, 0 no better than zeros. Measured on the first
    held-out documents.
    """
    tokens = Tokens.open(tokens_folder)
    model, _ = load(weights, where)
    documents = np.flatnonzero(tokens.held_out)[:CE_DOCUMENTS]
    replacements = [torch.zeros_like, *(_reconstruction(sae) for sae in saes)]
    clean, replaced = 0.0, np.zeros(len(replacements))
    for batch in length_buckets(tokens, documents.tolist()):
        ids_BT = padded(tokens, batch).to(where)
        lengths_B = torch.tensor([len(tokens.ids(document)) for document in batch], device=where)
        real_BT = torch.arange(1, ids_BT.shape[1], device=where) < lengths_B[:, None]
        clean += _summed_loss(model, ids_BT, real_BT)
        for number, function in enumerate(replacements):
            with replace_output(model, layer, hook, function):
                replaced[number] += _summed_loss(model, ids_BT, real_BT)
    zeroed, *reconstructed = replaced
    return [float((zeroed - loss) / (zeroed - clean)) for loss in reconstructed]


def _reconstruction(sae: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    return lambda acts_BTD: sae.decode(sae.encode(acts_BTD.flatten(0, 1))).view_as(acts_BTD)


def _summed_loss(model: PreTrainedModel, ids_BT: Tensor, real_BT: Tensor) -> float:
    """Next-token cross-entropy in nats, summed over the tokens that follow another one."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits_BTV[real_BT].float(), ids_BT[:, 1:][real_BT], reduction="sum").item()
