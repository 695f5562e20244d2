"""A threshold for each latent, trained towards a number of active latents (Rajamanoharan et al., arXiv 2407.14435).

    p = x W_encᵀ + b_enc,   f = ReLU(p) · H(p - θ),   x̂ = f W_dec + b_dec,   ‖W_dec,i‖ = 1 for every latent i
    L = mean over rows of ‖x - x̂‖²  +  l0_weight · (L0 / l0 - 1)²,   L0 = mean over rows of Σ_i H(p_i - θ_i)

H is the step function. Its derivative is estimated as that of a ramp of width ε = `bandwidth`: 1/ε by p and -1/ε by θ where
|p - θ| < ε/2, else 0. That p has its share, so that the encoder turns away from what it barely detects, is from Anthropic's
"Circuits Updates", 2025-01; in the paper θ alone has it, and on planted directions that finds fewer of them. The squared
distance from a wanted L0 is the paper's section 5.1. Rows have a mean squared length of 1.
Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsae.config import JumpReluDictionary
from rlsae.sae.activation_functions import ActivationFunction, JumpReLU
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.member import Autograd, Figures

INITIAL_THRESHOLD = 0.001


class Step(torch.autograd.Function):
    """H(p - θ), with the gradient of a ramp."""

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (pre_BF > threshold_F).to(pre_BF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_BF, threshold_F = ctx.saved_tensors
        near_BF = (pre_BF - threshold_F).abs() < ctx.bandwidth / 2
        grad_BF = grads[0] * near_BF / ctx.bandwidth
        return grad_BF, -grad_BF.sum(0), None


class JumpRelu(Autograd):
    unit_length = True

    def __init__(self, channels: int, latents: int, entry: JumpReluDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.l0, self.l0_weight, self.bandwidth = entry.l0, entry.l0_weight, entry.bandwidth
        self.threshold_F = torch.full((latents,), INITIAL_THRESHOLD, device=device).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return super().parameters() | {"threshold_F": self.threshold_F}

    def loss(self, acts_BD: Tensor, strength: float) -> tuple[Tensor, Figures]:
        pre_BF = torch.addmm(self.b_enc_F, acts_BD, self.W_enc_FD.T).float()
        active_BF = Step.apply(pre_BF, self.threshold_F, self.bandwidth)
        latents_BF = pre_BF.relu() * active_BF
        mse = (acts_BD - torch.addmm(self.b_dec_D, latents_BF, self.W_dec_FD)).square().sum(1).mean()
        l0 = active_BF.sum(1).mean()
        loss = mse + strength * self.l0_weight * (l0 / self.l0 - 1).square()
        return loss, {"mse": mse, "l1": latents_BF.sum(1).mean(), "l0": l0}

    def constrain(self) -> None:
        super().constrain()
        self.threshold_F.data.clamp_(min=0)

    def activation(self) -> ActivationFunction:
        return JumpReLU(self.threshold_F.detach())

    def load(self, sae: SparseAutoencoder) -> None:
        super().load(sae)
        assert isinstance(sae.activation, JumpReLU)
        self.threshold_F.copy_(sae.activation.threshold_F)
