"""What a probe reads: latents, raw activations and what they must beat.

Shapes: N spans, T positions, D channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.interpretation.probes.spans import Span
from rlsae.models import Hook, blocks, component, output_tensor
from rlsae.sae.dictionary import SparseAutoencoder

FEATURES = ("tuned_sae", "base_sae", "tuned_raw", "base_raw", "random_projection", "bag_of_words")
"""Latents and activations of tuned and base model; as many random directions of the tuned activations as there are latents;
tokens counted."""
BATCH_TOKENS = 4096

Features = dict[str, NDArray[np.float32]]


def all_features(
    spans: Sequence[Span],
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    hook: Hook,
    saes: Mapping[tuple[str, int], SparseAutoencoder],
    seed: int = 0,
) -> Features:
    """Every feature set [N, F] by its name in `FEATURES`, layers one after the other in order.

    Args:
        base, tuned: on the device that is to be used.
        saes: dictionaries by role and layer, both roles of each layer.
    """
    layers = sorted({layer for _, layer in saes})
    found: Features = {}
    for role, model in (("tuned", tuned), ("base", base)):
        where = model.device
        encoders = {layer: saes[role, layer].to(where).encode for layer in layers}
        found |= {f"{role}_{kind}": rows for kind, rows in pooled(model, hook, encoders, spans).items()}
    latents = sum(saes["tuned", layer].latents for layer in layers)
    ordered: Features = {name: found[name] for name in FEATURES if name in found}
    ordered["random_projection"] = random_projection(found["tuned_raw"], latents, seed)
    ordered["bag_of_words"] = token_counts(spans)
    return ordered


@torch.inference_mode()
def pooled(
    model: PreTrainedModel, hook: Hook, encoders: Mapping[int, Callable[[Tensor], Tensor]], spans: Sequence[Span]
) -> Features:
    """Means over each span of what the layers' encoders make of the activations, `sae` [N, F], and of these, `raw` [N, D].

    A mean of latents, not latents of a mean: the second need not be those of any token. Padding stands on the right, where
    causal attention never looks, so that positions count from the first token.
    """
    order = sorted(range(len(spans)), key=lambda n: len(spans[n].ids))
    rows: dict[str, list[Tensor]] = {"sae": [], "raw": []}
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, arguments, output: kept.__setitem__(layer, output_tensor(output))

    handles = [component(blocks(model)[layer], hook).register_forward_hook(keep(layer)) for layer in sorted(encoders)]
    try:
        for batch in _batches(order, spans):
            longest = max(len(spans[n].ids) for n in batch)
            ids_NT = torch.zeros(len(batch), longest, dtype=torch.long)
            mask_NT = torch.zeros_like(ids_NT)
            for row, n in enumerate(batch):
                ids_NT[row, : len(spans[n].ids)] = torch.tensor(spans[n].ids)
                mask_NT[row, : len(spans[n].ids)] = 1
            model.base_model(input_ids=ids_NT.to(model.device), attention_mask=mask_NT.to(model.device), use_cache=False)
            sizes = [spans[n].last - spans[n].first for n in batch]
            raw, sae = [], []
            for layer in sorted(encoders):
                acts_ND = torch.cat([kept[layer][row, spans[n].first : spans[n].last] for row, n in enumerate(batch)]).float()
                raw.append(_means(acts_ND, sizes))
                sae.append(_means(encoders[layer](acts_ND), sizes))
            rows["raw"].append(torch.cat(raw, 1))
            rows["sae"].append(torch.cat(sae, 1))
    finally:
        for handle in handles:
            handle.remove()
    back = np.argsort(order, kind="stable")
    return {name: torch.cat(parts).cpu().numpy()[back] for name, parts in rows.items()}


def random_projection(raw_ND: NDArray[np.float32], features: int, seed: int = 0) -> NDArray[np.float32]:
    """max(0, x W) with a normal W: as many features as a dictionary has, none of them learned [N, F]."""
    rng = np.random.default_rng([seed, 2])
    W_DF = rng.standard_normal((raw_ND.shape[1], features), dtype=np.float32) / np.sqrt(raw_ND.shape[1], dtype=np.float32)
    return np.maximum(raw_ND @ W_DF, 0)


def token_counts(spans: Sequence[Span]) -> NDArray[np.float32]:
    """How often each token that occurs stands in a text up to the end of its span [N, F], by token id."""
    tokens, place = np.unique(np.concatenate([span.ids[: span.last] for span in spans]), return_inverse=True)
    counts = np.zeros((len(spans), len(tokens)), np.float32)
    np.add.at(counts, (np.repeat(np.arange(len(spans)), [span.last for span in spans]), place), 1)
    return counts


def _means(rows_ND: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.mean(0) for part in rows_ND.split(sizes)])


def _batches(order: list[int], spans: Sequence[Span]) -> list[list[int]]:
    """Spans of similar length, so many that a padded batch has at most `BATCH_TOKENS` tokens."""
    batches: list[list[int]] = []
    for n in order:
        if not batches or (len(batches[-1]) + 1) * len(spans[n].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(n)
    return batches
