"""ReLU and L1 with free weights; the penalty counts the decoder's norm (Anthropic, "Update on how we train SAEs", 2024-04).

    f = ReLU(x W_encᵀ + b_enc),   x̂ = f W_dec + b_dec
    L = mean over rows of ‖x - x̂‖² + l1 Σ_i f_i ‖W_dec,i‖,   rows of mean squared length 1

The norm in the penalty makes L the same for every split of a latent's size between f_i and W_dec,i, so that nothing has to
be constrained. In a crosscoder it is the sum of the norms of both models' parts (Lindsey et al. 2024, "Sparse Crosscoders").
Some latents may be designated as shared: their two parts are held equal and charged a fraction of l1, so that what both
models have does not fill the others (Mishra-Sharma et al. 2025, "Insights on Crosscoder Model Diffing"). Shapes: B rows,
D channels, F latents, M models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import ReluDictionary
from rlsae.sae.dense_code import relu_, relu_backward_
from rlsae.sae.member import Figures, Untied, by_model


class Relu(Untied):
    """One member in training, with its gradients in closed form and its buffers allocated once."""

    unit_length = True

    def __init__(self, channels: int, latents: int, entry: ReluDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.shared = round(entry.shared_share * latents)
        """The first latents, which are designated as shared."""
        self.l1_F = torch.full((latents,), entry.l1, device=device)
        self.l1_F[: self.shared] *= entry.shared_penalty
        self._hold_equal(self.W_dec_FD)
        self._latents_BF = torch.empty(entry.batch_rows, latents, device=device, dtype=self.dtype)
        self._grad_BF = torch.empty_like(self._latents_BF)
        self._rebuilt_BD = torch.empty(entry.batch_rows, channels, device=device, dtype=self.dtype)

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        rows = len(acts_BD)
        x_BD, W_enc_FD, W_dec_FD = (factor.to(self.dtype) for factor in (acts_BD, self.W_enc_FD, self.W_dec_FD))
        latents_BF = torch.mm(x_BD, W_enc_FD.T, out=self._latents_BF)
        sum_F, active = relu_(latents_BF, self.b_enc_F)
        error_BD = torch.mm(latents_BF, W_dec_FD, out=self._rebuilt_BD).float().add_(self.b_dec_D).sub_(acts_BD)
        W_dec_FMD = by_model(self.W_dec_FD, self.models)
        norm_FM, mean_F = W_dec_FMD.norm(dim=2), sum_F / rows
        norm_F = norm_FM.sum(1)
        figures = {"mse": error_BD.square().sum() / rows, "l1": mean_F @ norm_F, "l0": active / rows}
        l1_F = strength * self.l1_F
        grad_BD = error_BD.mul_(2 / rows).to(self.dtype)
        grad_BF = torch.mm(grad_BD, W_dec_FD.T, out=self._grad_BF)
        self.b_enc_F.grad = relu_backward_(grad_BF, latents_BF, l1_F / rows * norm_F)
        self.W_enc_FD.grad, self.b_dec_D.grad = torch.mm(grad_BF.T, x_BD).float(), error_BD.sum(0)
        grad_FD = torch.mm(latents_BF.T, grad_BD).float()
        grad_norm_FM = (l1_F * mean_F)[:, None] / norm_FM.clamp_min(1e-12)
        by_model(grad_FD, self.models).addcmul_(W_dec_FMD, grad_norm_FM[..., None])
        self._hold_equal(grad_FD)
        self.W_dec_FD.grad = grad_FD
        return figures

    def _hold_equal(self, values_FD: Tensor) -> None:
        """Give both models' parts of the shared latents their mean."""
        if self.shared:
            shared_SMD = by_model(values_FD[: self.shared], self.models)
            shared_SMD.copy_(shared_SMD.mean(1, keepdim=True))
