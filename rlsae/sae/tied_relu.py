"""The paper's autoencoder: tied weights, ReLU, L1 (arXiv 2310.08164 section 3.2; after Cunningham et al., arXiv 2309.08600).

    f = ReLU(x Wᵀ + b_enc),   x̂ = f W + b_dec,   ‖W_i‖ = 1 for every latent i
    L = mean over rows and channels of (x - x̂)²  +  l1 · mean over rows of ‖f‖₁

Rows of W are kept at unit length by removing each gradient's part along its row and normalising after the step, which
follows the same path as the paper's normalisation inside the forward pass. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlsae.config import TiedReluDictionary
from rlsae.sae.dense_code import relu_, relu_backward_
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.member import Figures, random_directions, without_parallel_part


class TiedRelu:
    """One member in training, with its gradients in closed form and its buffers allocated once."""

    unit_length: ClassVar[bool] = False

    def __init__(self, channels: int, latents: int, entry: TiedReluDictionary, seed: int, device: torch.device) -> None:
        self.l1, self.dtype = entry.l1, getattr(torch, entry.precision)
        self.W_FD = random_directions(channels, latents, seed).to(device)
        self.b_enc_F = torch.zeros(latents, device=device)
        self.b_dec_D = torch.zeros(channels, device=device)
        self._latents_BF = torch.empty(entry.batch_rows, latents, device=device, dtype=self.dtype)
        self._grad_BF = torch.empty_like(self._latents_BF)
        self._rebuilt_BD = torch.empty(entry.batch_rows, channels, device=device, dtype=self.dtype)

    def parameters(self) -> dict[str, Tensor]:
        return {"W_FD": self.W_FD, "b_enc_F": self.b_enc_F, "b_dec_D": self.b_dec_D}

    def counters(self) -> dict[str, Tensor]:
        return {}

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        rows, channels = acts_BD.shape
        x_BD, W_FD = acts_BD.to(self.dtype), self.W_FD.to(self.dtype)
        latents_BF = torch.mm(x_BD, W_FD.T, out=self._latents_BF)
        sum_F, active = relu_(latents_BF, self.b_enc_F)
        error_BD = torch.mm(latents_BF, W_FD, out=self._rebuilt_BD).float().add_(self.b_dec_D).sub_(acts_BD)
        figures = {"mse": error_BD.square().mean(), "l1": sum_F.sum() / rows, "l0": active / rows}
        grad_BD = error_BD.mul_(2 / (rows * channels)).to(self.dtype)
        grad_BF = torch.mm(grad_BD, W_FD.T, out=self._grad_BF)
        self.b_enc_F.grad = relu_backward_(grad_BF, latents_BF, torch.full_like(self.b_enc_F, strength * self.l1 / rows))
        grad_FD = torch.mm(latents_BF.T, grad_BD).addmm_(grad_BF.T, x_BD).float()
        self.W_FD.grad = without_parallel_part(grad_FD, self.W_FD)
        self.b_dec_D.grad = error_BD.sum(0)
        return figures

    def constrain(self) -> None:
        normalize(self.W_FD, dim=1, out=self.W_FD)

    def export(self) -> SparseAutoencoder:
        return SparseAutoencoder(self.W_FD.T, self.b_enc_F, self.W_FD, self.b_dec_D)

    def load(self, sae: SparseAutoencoder) -> None:
        self.W_FD.copy_(sae.W_dec_FD)
        self.b_enc_F.copy_(sae.b_enc_F)
        self.b_dec_D.copy_(sae.b_dec_D)
