"""ReLU and L1 with free weights; the penalty counts the decoder's norm (Anthropic, "Update on how we train SAEs", 2024-04).

    f = ReLU(x W_encᵀ + b_enc),   x̂ = f W_dec + b_dec
    L = mean over rows of ‖x - x̂‖² + l1 Σ_i f_i ‖W_dec,i‖,   rows of mean squared length 1

The norm in the penalty makes L the same for every split of a latent's size between f_i and W_dec,i, so that nothing has to
be constrained. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import ReluDictionary
from rlsae.sae.dense_code import relu_, relu_backward_
from rlsae.sae.member import Figures, Untied


class Relu(Untied):
    """One member in training, with its gradients in closed form and its buffers allocated once."""

    unit_length = True

    def __init__(self, channels: int, latents: int, entry: ReluDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.l1 = entry.l1
        self._latents_BF = torch.empty(entry.batch_rows, latents, device=device, dtype=self.dtype)
        self._grad_BF = torch.empty_like(self._latents_BF)
        self._rebuilt_BD = torch.empty(entry.batch_rows, channels, device=device, dtype=self.dtype)

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        rows = len(acts_BD)
        x_BD, W_enc_FD, W_dec_FD = (factor.to(self.dtype) for factor in (acts_BD, self.W_enc_FD, self.W_dec_FD))
        latents_BF = torch.mm(x_BD, W_enc_FD.T, out=self._latents_BF)
        sum_F, active = relu_(latents_BF, self.b_enc_F)
        error_BD = torch.mm(latents_BF, W_dec_FD, out=self._rebuilt_BD).float().add_(self.b_dec_D).sub_(acts_BD)
        norm_F, mean_F = self.W_dec_FD.norm(dim=1), sum_F / rows
        figures = {"mse": error_BD.square().sum() / rows, "l1": mean_F @ norm_F, "l0": active / rows}
        l1 = strength * self.l1
        grad_BD = error_BD.mul_(2 / rows).to(self.dtype)
        grad_BF = torch.mm(grad_BD, W_dec_FD.T, out=self._grad_BF)
        self.b_enc_F.grad = relu_backward_(grad_BF, latents_BF, l1 / rows * norm_F)
        self.W_enc_FD.grad, self.b_dec_D.grad = torch.mm(grad_BF.T, x_BD).float(), error_BD.sum(0)
        grad_norm_F = l1 * mean_F / norm_F.clamp_min(1e-12)
        self.W_dec_FD.grad = torch.mm(latents_BF.T, grad_BD).float().addcmul_(self.W_dec_FD, grad_norm_F[:, None])
        return figures
