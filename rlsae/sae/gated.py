"""Which latents are active, and how much, decided apart (Rajamanoharan et al., arXiv 2404.16014).

    p = x W_encᵀ,   gate = p + b_gate,   f = H(gate) · ReLU(exp(r_mag) · p + b_mag)
    x̂ = f W_dec + b_dec,   ‖W_dec,i‖ = 1 for every latent i
    L = mean over rows of ‖x - x̂‖² + l1 ‖ReLU(gate)‖₁ + ‖x - ReLU(gate) W_dec - b_dec‖²,   rows of mean squared length 1

L1 pushes the gate alone, so that magnitudes do not shrink; the third term, with W_dec and b_dec as constants, is what trains
the gate, since the step function H has no gradient. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import GatedDictionary
from rlsae.sae import activation_functions
from rlsae.sae.activation_functions import ActivationFunction
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.member import Autograd, Figures


class Gated(Autograd):
    """`b_enc_F` is b_gate."""

    unit_length = True

    def __init__(self, channels: int, latents: int, entry: GatedDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.l1 = entry.l1
        self.r_mag_F = torch.zeros(latents, device=device).requires_grad_()
        self.b_mag_F = torch.zeros(latents, device=device).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return super().parameters() | {"r_mag_F": self.r_mag_F, "b_mag_F": self.b_mag_F}

    def loss(self, acts_BD: Tensor, strength: float) -> tuple[Tensor, Figures]:
        pre_BF = (acts_BD @ self.W_enc_FD.T).float()
        gate_BF = pre_BF + self.b_enc_F
        latents_BF = (gate_BF > 0) * torch.relu(self.r_mag_F.exp() * pre_BF + self.b_mag_F)
        mse = (acts_BD - torch.addmm(self.b_dec_D, latents_BF, self.W_dec_FD)).square().sum(1).mean()
        open_BF = gate_BF.relu()
        by_gate_BD = torch.addmm(self.b_dec_D.detach(), open_BF, self.W_dec_FD.detach())
        loss = mse + strength * self.l1 * open_BF.sum(1).mean() + (acts_BD - by_gate_BD).square().sum(1).mean()
        return loss, {"mse": mse, "l1": open_BF.sum(1).mean(), "l0": torch.count_nonzero(latents_BF) / len(acts_BD)}

    def activation(self) -> ActivationFunction:
        r_mag_F = self.r_mag_F.detach()
        return activation_functions.Gated(r_mag_F, self.b_mag_F.detach() - r_mag_F.exp() * self.b_enc_F.detach())

    def load(self, sae: SparseAutoencoder) -> None:
        super().load(sae)
        assert isinstance(sae.activation, activation_functions.Gated)
        self.r_mag_F.copy_(sae.activation.r_mag_F)
        self.b_mag_F.copy_(sae.activation.tensors(sae.b_enc_F)["b_mag"])
