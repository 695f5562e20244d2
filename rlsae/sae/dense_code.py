"""Latents of a whole batch as a matrix, between the matrix products: one pass forward, one backward.

Shapes: B rows, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.sae import compiled


def relu_(pre_BF: Tensor, b_enc_F: Tensor) -> tuple[Tensor, Tensor]:
    """Turn x W_encᵀ, in place, into latents ReLU(x W_encᵀ + b_enc).

    Returns:
        the sum of each latent over the rows [F], and how many are active in all.
    """
    if compiled.serves(pre_BF):
        return compiled.relu_(pre_BF, b_enc_F)
    pre_BF.add_(b_enc_F).relu_()
    return pre_BF.sum(0, dtype=torch.float32), pre_BF.sign().sum(dtype=torch.float32)


def relu_backward_(grad_BF: Tensor, latents_BF: Tensor, shared_F: Tensor) -> Tensor:
    """Turn gradients by the latents, to each row of which `shared_F` is added first, into those by the pre-activations.

    Returns:
        their sum over the rows [F], the gradient of b_enc.
    """
    if compiled.serves(grad_BF):
        return compiled.relu_backward_(grad_BF, latents_BF, shared_F)
    grad_BF.add_(shared_F).mul_(latents_BF > 0)
    return grad_BF.sum(0, dtype=torch.float32)
