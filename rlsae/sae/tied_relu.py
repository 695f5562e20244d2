"""The paper's autoencoder: tied weights, ReLU, L1 (arXiv 2310.08164 section 3.2; after Cunningham et al., arXiv 2309.08600).

    f = ReLU(x Wᵀ + b_enc),   x̂ = f W + b_dec,   ‖W_i‖ = 1 for every latent i
    L = mean over rows and channels of (x - x̂)²  +  l1 · mean over rows of ‖f‖₁

Rows of W are kept at unit length by removing each gradient's part along its row and normalising after the step, which
follows the same path as the paper's normalisation inside the forward pass. Shapes: B rows, D channels, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlsae.config import Dictionary
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.training import joint_seed


class TiedRelu:
    """One member in training, with its gradients in closed form and its buffers allocated once."""

    def __init__(self, channels: int, latents: int, entry: Dictionary, seed: int, device: torch.device) -> None:
        # The width enters too: a small and a big dictionary of one seed must not share their first rows.
        generator = torch.Generator().manual_seed(joint_seed(seed, latents))
        self.l1 = entry.l1
        self.W_FD = normalize(torch.randn(latents, channels, generator=generator), dim=1).to(device)
        self.b_enc_F = torch.zeros(latents, device=device)
        self.b_dec_D = torch.zeros(channels, device=device)
        self._latents_BF = torch.empty(entry.batch_rows, latents, device=device)
        self._grad_BF = torch.empty_like(self._latents_BF)
        self._error_BD = torch.empty(entry.batch_rows, channels, device=device)

    def parameters(self) -> dict[str, Tensor]:
        return {"W_FD": self.W_FD, "b_enc_F": self.b_enc_F, "b_dec_D": self.b_dec_D}

    def backward(self, acts_BD: Tensor) -> dict[str, Tensor]:
        """Set the gradients of L on one batch.

        Returns:
            `mse` (mean over rows and channels), `l1` and `l0` (means over rows), left on the device.
        """
        rows, channels = acts_BD.shape
        latents_BF = torch.addmm(self.b_enc_F, acts_BD, self.W_FD.T, out=self._latents_BF).relu_()
        error_BD = torch.addmm(self.b_dec_D, latents_BF, self.W_FD, out=self._error_BD).sub_(acts_BD)
        figures = {
            "mse": error_BD.square().mean(),
            "l1": latents_BF.sum() / rows,
            "l0": torch.count_nonzero(latents_BF) / rows,
        }
        error_BD.mul_(2 / (rows * channels))  # now ∂L/∂x̂
        grad_BF = torch.mm(error_BD, self.W_FD.T, out=self._grad_BF).add_(self.l1 / rows)
        torch.ops.aten.threshold_backward.grad_input(grad_BF, latents_BF, 0, grad_input=grad_BF)  # ReLU
        grad_FD = torch.mm(latents_BF.T, error_BD).addmm_(grad_BF.T, acts_BD)
        grad_FD.sub_(self.W_FD * (grad_FD * self.W_FD).sum(1, keepdim=True))
        self.W_FD.grad, self.b_enc_F.grad, self.b_dec_D.grad = grad_FD, grad_BF.sum(0), error_BD.sum(0)
        return figures

    def constrain(self) -> None:
        """After an optimizer step: rows of unit length again."""
        normalize(self.W_FD, dim=1, out=self.W_FD)

    def export(self, mean_D: Tensor, scale: float) -> SparseAutoencoder:
        """The same function of raw rows y, where training saw x = (y - mean) · scale."""
        W_DF = self.W_FD.T
        return SparseAutoencoder(
            W_enc_DF=W_DF * scale,
            b_enc_F=self.b_enc_F - scale * (mean_D @ W_DF),
            W_dec_FD=self.W_FD / scale,
            b_dec_D=self.b_dec_D / scale + mean_D,
        )
