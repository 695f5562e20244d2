"""Where latents fire: token statistics and top windows, in one pass over a store.

Shapes: B rows, S selected latents, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore
from rlsae.sae.dictionary import SparseAutoencoder

ROWS = 8192
"""Rows that are encoded at once."""


@dataclass(frozen=True)
class Evidence:
    """What the selected latents of one dictionary do on the rows of a store."""

    row_acts_NS: NDArray[np.float32]
    """Activation of each selected latent at every row [rows, S]."""
    token_mean_SV: NDArray[np.float64]
    """Mean activation at each token over the training documents; 0 where the token does not occur."""
    token_count_V: NDArray[np.int64]
    """Occurrences of each token in the training documents."""


@torch.inference_mode()
def gather(sae: SparseAutoencoder, store: ActivationStore, layer: int, latents: NDArray[np.int64]) -> Evidence:
    """Encode every row; keep the selected latents."""
    selected = torch.tensor(latents)
    row_acts_NS = np.empty((store.rows, len(latents)), np.float32)
    for first in range(0, store.rows, ROWS):
        latents_BF = sae.encode(torch.from_numpy(store.read(layer, first, first + ROWS)).float())
        row_acts_NS[first : first + ROWS] = latents_BF[:, selected].numpy()
    token = store.group["token"][:]
    train = ~store.held_out_rows()
    vocabulary = int(token.max()) + 1
    count_V = np.bincount(token[train], minlength=vocabulary)
    sums_SV = np.zeros((len(latents), vocabulary))
    for s in range(len(latents)):
        sums_SV[s] = np.bincount(token[train], row_acts_NS[train, s], vocabulary)
    return Evidence(row_acts_NS, sums_SV / np.maximum(count_V, 1), count_V)


def top_windows(
    acts_N: NDArray[np.float32], store: ActivationStore, count: int, window: int
) -> list[tuple[int, int, int, int]]:
    """The strongest windows of one latent, at most one per document.

    Returns:
        (document, first row, last row + 1, row of the peak), strongest first; only where the latent fires.
    """
    documents = np.flatnonzero(np.diff(store.start))  # short ones may have lost all their rows to dropped positions
    peaks = np.maximum.reduceat(acts_N, store.start[documents])
    windows = []
    for place in np.argsort(-peaks, kind="stable")[:count]:
        if peaks[place] <= 0:
            break
        document = documents[place]
        low, high = int(store.start[document]), int(store.start[document + 1])
        peak = low + int(np.argmax(acts_N[low:high]))
        first = max(low, min(peak - window // 2, high - window))
        windows.append((int(document), first, min(first + window, high), peak))
    return windows
