"""How alike matched latents of base and tuned fire on the same tokens: description only, it decides nothing.

Shapes: B rows, F latents, P pairs of latents.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlsae.comparison.paired_rows import PairedRows
from rlsae.sae.dictionary import SparseAutoencoder


@torch.inference_mode()
def agreement(
    saes: dict[str, SparseAutoencoder], rows: PairedRows, partners: dict[str, NDArray[np.int64]], where: torch.device
) -> dict[str, pd.DataFrame]:
    """Compare each latent with its partner on the held-out rows.

    Args:
        partners: latent of the other dictionary [F], by role; -1 where there is none.

    Returns:
        by role, a row per latent: `match_jaccard`, rows on which both fire of those on which one does; `match_pearson`,
        correlation of the activations; `density_shift`, log10 of how much more often the tuned one fires. nan without partner.
    """
    base_P = np.flatnonzero(partners["base"] >= 0)
    tuned_P = partners["base"][base_P]
    chosen = {"base": torch.from_numpy(base_P).to(where), "tuned": torch.from_numpy(tuned_P).to(where)}
    fired_P, summed_P, squared_P = torch.zeros(3, 2, len(base_P), dtype=torch.float64, device=where)
    both_P, product_P = torch.zeros(2, len(base_P), dtype=torch.float64, device=where)
    count = 0
    for _, *acts, held_out_B in rows.batches(where):
        latents = [
            sae.encode(acts_BD[held_out_B]).index_select(1, chosen[role])
            for (role, sae), acts_BD in zip(sorted(saes.items()), acts, strict=True)
        ]
        fires = [latents_BP.sign() for latents_BP in latents]
        for number, latents_BP in enumerate(latents):
            fired_P[number] += fires[number].sum(0)
            summed_P[number] += latents_BP.sum(0)
            squared_P[number] += latents_BP.square().sum(0)
        both_P += (fires[0] * fires[1]).sum(0)
        product_P += (latents[0] * latents[1]).sum(0)
        count += len(latents[0])
    variance_P = squared_P / count - (summed_P / count).square()
    of_pairs = {
        "match_jaccard": both_P / (fired_P.sum(0) - both_P),
        "match_pearson": (product_P / count - summed_P.prod(0) / count**2) / variance_P.prod(0).sqrt(),
        "density_shift": torch.log10(fired_P[1] / fired_P[0]),
    }
    table = pd.DataFrame({name: values_P.cpu().numpy() for name, values_P in of_pairs.items()})
    return {
        role: table.set_axis(latents_P, axis=0).reindex(range(len(partners[role])))
        for role, latents_P in (("base", base_P), ("tuned", tuned_P))
    }
