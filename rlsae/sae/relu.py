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
from rlsae.sae.member import Figures, Untied


class Relu(Untied):
    """One member in training, with its gradients in closed form and its buffers allocated once."""

    unit_length = True

    def __init__(self, channels: int, latents: int, entry: ReluDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, seed, device)
        self.l1 = entry.l1
        self._latents_BF = torch.empty(entry.batch_rows, latents, device=device)
        self._grad_BF = torch.empty_like(self._latents_BF)
        self._error_BD = torch.empty(entry.batch_rows, channels, device=device)

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        rows = len(acts_BD)
        latents_BF = torch.addmm(self.b_enc_F, acts_BD, self.W_enc_FD.T, out=self._latents_BF).relu_()
        error_BD = torch.addmm(self.b_dec_D, latents_BF, self.W_dec_FD, out=self._error_BD).sub_(acts_BD)
        norm_F, mean_F = self.W_dec_FD.norm(dim=1), latents_BF.sum(0).div_(rows)
        figures = {
            "mse": error_BD.square().sum() / rows,
            "l1": mean_F @ norm_F,
            "l0": torch.sign(latents_BF, out=self._grad_BF).sum() / rows,  # a tenth of the time of count_nonzero
        }
        l1 = strength * self.l1
        error_BD.mul_(2 / rows)  # now ∂L/∂x̂
        grad_BF = torch.addmm(norm_F, error_BD, self.W_dec_FD.T, beta=l1 / rows, out=self._grad_BF)
        torch.ops.aten.threshold_backward.grad_input(grad_BF, latents_BF, 0, grad_input=grad_BF)  # ReLU
        grad_norm_FD = self.W_dec_FD * (l1 * mean_F / norm_F.clamp_min(1e-12))[:, None]
        self.W_enc_FD.grad, self.b_enc_F.grad = torch.mm(grad_BF.T, acts_BD), grad_BF.sum(0)
        self.W_dec_FD.grad, self.b_dec_D.grad = grad_norm_FD.addmm_(latents_BF.T, error_BD), error_BD.sum(0)
        return figures
