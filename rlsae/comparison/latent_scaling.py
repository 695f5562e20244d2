"""Latent scaling in one dimension (Minder et al., arXiv 2504.02922): beside the test, for comparison; it decides nothing.

How much of its own direction d_j does each model's error contain where latent j fires, with the latent's part put back?

    β_j^m = (⟨d_j, E[f_j (y^m - x̂^m)]⟩ / E[f_j²] + ⟨d_j, d_j^m⟩) / |d_j|²,   scale_error = β_j^other / β_j^own

d_j is what the latent writes in its own model, d_j^m and x̂^m what the dictionary writes in model m: of a crosscoder its part
for m, else the same for both. About 0: the other model lacks what the latent writes; about 1: both have it. Blind to turns.
Shapes: D channels, F latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One model, and what the dictionary writes there."""

    cross_FD: Tensor
    """E[fᵀ y], not centred."""
    W_dec_FD: Tensor
    b_dec_D: Tensor


def scale_error(covariance_FF: Tensor, mean_F: Tensor, base: Part, tuned: Part, own_is_base_F: Tensor) -> Tensor:
    """β^other / β^own of each latent [F].

    Args:
        covariance_FF, mean_F: of the code.
        own_is_base_F: whether a latent's own model is the base.
    """
    mine_F1 = own_is_base_F[:, None]
    d_FD = torch.where(mine_F1, base.W_dec_FD, tuned.W_dec_FD).double()
    square_F = covariance_FF.diagonal() + mean_F.square()
    beta_FM = []
    for cross_FD, W_dec_FD, b_dec_D in (base, tuned):
        W_dec_FD, b_dec_D = W_dec_FD.double(), b_dec_D.double()
        reconstructed_FD = covariance_FF @ W_dec_FD + torch.outer(mean_F, mean_F @ W_dec_FD + b_dec_D)
        beta_FM.append((d_FD * ((cross_FD - reconstructed_FD) / square_F[:, None] + W_dec_FD)).sum(1))
    base_F, tuned_F = beta_FM
    return torch.where(own_is_base_F, tuned_F / base_F, base_F / tuned_F)
