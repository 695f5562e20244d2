"""Which latents have to do with the feedback? Of all latents of a dictionary, in one pass over the documents.

- `reward_correlation`: Pearson's correlation, over training documents, of a latent's mean activation and the reward.
- `task_tagged`: where the reward is a lexicon, does the latent fire on words of one polarity (explainers/lexicon.py)? Else:
  does its mean activation go with the reward? Tagged are effects of a least size among those that Benjamini and Hochberg's
  procedure rejects, over the dictionary's latents. It stands for what the paper asks GPT-4 ("related to sentiment?").

Documents are the independent units. Shapes: T documents, F latents, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from rlsae.activations.store import ActivationStore
from rlsae.comparison.tags import FALSE_DISCOVERY_RATE, benjamini_hochberg
from rlsae.interpretation.explainers.lexicon import MIN_POLARITY, polarity_test
from rlsae.interpretation.positions import Positions
from rlsae.sae.dictionary import SparseAutoencoder

MIN_CORRELATION = 0.1
"""With the reward, below which a latent has nothing to do with it, however certain the sign."""
ROWS = 8192
"""Rows that are encoded at once."""

Array = NDArray[np.floating]


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the tokens of each training document at which a latent fires [T, F]."""

    acts_TF: Array
    fired_TF: Array
    polarity_TF: Array
    tokens_T: NDArray[np.int64]
    background: float
    """Mean polarity of all their tokens."""


@torch.inference_mode()
def document_sums(
    sae: SparseAutoencoder, store: ActivationStore, layer: int, positions: Positions, polarity_V: Array, where: torch.device
) -> DocumentSums:
    """One pass over the rows of a layer."""
    training = np.flatnonzero(~np.asarray(store.held_out, bool) & (np.diff(store.start) > 0))
    number_T = np.full(len(store.start) - 1, -1)
    number_T[training] = np.arange(len(training))
    document_N, polarity_N = number_T[positions.document_N], polarity_V[positions.token_N]
    sums = [torch.zeros(len(training), sae.latents, device=where) for _ in range(3)]
    sae = sae.to(where)
    for first in range(0, store.rows, ROWS):
        some = slice(first, first + ROWS)
        mine_B = document_N[some] >= 0
        acts_BD = torch.from_numpy(store.read(layer, first, first + ROWS)[mine_B]).to(where, torch.float32)
        index_B = torch.from_numpy(document_N[some][mine_B]).to(where)
        weight_B = torch.from_numpy(polarity_N[some][mine_B]).to(where, torch.float32)
        latents_BF = sae.encode(acts_BD)
        fired_BF = (latents_BF > 0).float()
        for total_TF, of_rows_BF in zip(sums, (latents_BF, fired_BF, fired_BF * weight_B[:, None]), strict=True):
            total_TF.index_add_(0, index_B, of_rows_BF)
    acts_TF, fired_TF, summed_TF = (total_TF.double().cpu().numpy() for total_TF in sums)
    return DocumentSums(acts_TF, fired_TF, summed_TF, np.diff(store.start)[training], float(polarity_N[document_N >= 0].mean()))


def reward_links(sums: DocumentSums, reward_T: Array, by_lexicon: bool) -> pd.DataFrame:
    """`reward_correlation task_tagged task_effect task_p` of every latent.

    Args:
        reward_T: of the training documents.
        by_lexicon: `task_effect` is a difference of polarity; else it is the correlation.
    """
    correlation_F = correlations(sums.acts_TF / sums.tokens_T[:, None], reward_T)
    least = MIN_POLARITY if by_lexicon else MIN_CORRELATION
    if by_lexicon:
        effect_F, p_F = polarity_test(sums.polarity_TF, sums.fired_TF, sums.background)
    else:
        effect_F, p_F = correlation_F, _fisher_p(correlation_F, len(reward_T))
    tested = ~np.isnan(p_F) & ~np.isnan(effect_F)
    q_F = np.ones(len(p_F))
    q_F[tested] = benjamini_hochberg(p_F[tested])
    tagged_F = tested & (q_F <= FALSE_DISCOVERY_RATE) & (np.abs(np.nan_to_num(effect_F)) >= least)
    return pd.DataFrame({"reward_correlation": correlation_F, "task_tagged": tagged_F, "task_effect": effect_F, "task_p": p_F})


def _fisher_p(correlation_F: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Two-sided p of correlations of `count` pairs, by Fisher's z."""
    z_F = np.arctanh(np.clip(correlation_F, -1 + 1e-12, 1 - 1e-12)) * np.sqrt(max(count - 3, 0))
    return 2 * norm.sf(np.abs(z_F))


def correlations(values_TF: Array, reward_T: Array) -> NDArray[np.float64]:
    """Pearson's correlation of each column with the reward [F]; nan where one of both is constant."""
    values_TF, reward_T = values_TF - values_TF.mean(0), reward_T - reward_T.mean()
    lengths_F = np.linalg.norm(values_TF, axis=0) * np.linalg.norm(reward_T)
    return np.divide(reward_T @ values_TF, lengths_F, out=np.full(values_TF.shape[1], np.nan), where=lengths_F > 0)
