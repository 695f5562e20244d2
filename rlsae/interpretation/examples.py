"""Where latents fire: their activations at all rows of a store, and the strongest windows. Shapes: B rows, S latents."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore
from rlsae.sae.dictionary import SparseAutoencoder

ROWS = 8192
"""Rows that are encoded at once."""


@torch.inference_mode()
def row_acts(
    sae: SparseAutoencoder, store: ActivationStore, layer: int, latents: NDArray[np.int64], where: torch.device
) -> NDArray[np.float32]:
    """Activation of some latents at every row of a layer [rows, S], in one pass."""
    selected = torch.tensor(latents, device=where)
    acts_NS = np.empty((store.rows, len(latents)), np.float32)
    for first in range(0, store.rows, ROWS):
        acts_BD = torch.from_numpy(store.read(layer, first, first + ROWS)).to(where, torch.float32)
        acts_NS[first : first + ROWS] = sae.encode(acts_BD)[:, selected].cpu().numpy()
    return acts_NS


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
