"""Latent scaling in one dimension (Minder et al., arXiv 2504.02922): beside the test, for comparison; it decides nothing.

How much of its own direction d_j does each model's error contain where latent j fires, with the latent's part put back?

    β_j^m = ⟨d_j, E[f_j (y^m - x̂)]⟩ / (|d_j|² E[f_j²]) + 1,   scale_error = β_j^other / β_j^own

About 0: the other model lacks what the latent writes; about 1: both have it. Blind to turns. Shapes: D channels, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_error(
    covariance_FF: Tensor, mean_F: Tensor, own_FD: Tensor, other_FD: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor
) -> Tensor:
    """β^other / β^own of each latent [F].

    Args:
        covariance_FF, mean_F: of the code.
        own_FD, other_FD: E[fᵀ y] of the two models, not centred.
        W_dec_FD, b_dec_D: decoder of the dictionary.
    """
    W_dec_FD, b_dec_D = W_dec_FD.double(), b_dec_D.double()
    reconstructed_FD = covariance_FF @ W_dec_FD + torch.outer(mean_F, mean_F @ W_dec_FD + b_dec_D)
    size_F = W_dec_FD.square().sum(1) * (covariance_FF.diagonal() + mean_F.square())
    own_F, other_F = ((W_dec_FD * (cross_FD - reconstructed_FD)).sum(1) / size_F + 1 for cross_FD in (own_FD, other_FD))
    return other_F / own_F
