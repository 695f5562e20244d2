"""The k largest latents of each row (Gao et al., arXiv 2406.04093).

    f = TopK(ReLU(x W_encᵀ + b_enc)),   x̂ = f W_dec + b_dec,   ‖W_dec,i‖ = 1 for every latent i (a crosscoder: Σ_m ‖W_dec,i^m‖)
    L = mean over rows and channels of (x - x̂)²  +  auxk_weight · Σ ‖e - ê‖² / Σ ‖e - mean of e‖²

The second term, auxk, revives dead latents: e = x - x̂ is the residual as a constant, and ê = Σ f'_i W_dec,i its
reconstruction by the D/2 largest latents f' among those that have not fired for `dead_rows` rows, without b_dec.
One dense product finds the active latents; all that follows visits them alone. Shapes: B rows, D channels, F latents, N
entries of the code, M reconstructions of a row (1 here), R = B·M, A dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import TopKFamily
from rlsae.sae import activation_functions
from rlsae.sae.activation_functions import ActivationFunction
from rlsae.sae.member import Figures, Untied, lengths, without_parallel_part
from rlsae.sae.sparse_code import SparseCode, largest_of_rows, sum_by_latent


class TopK(Untied):
    """One member in training, with its gradients in closed form."""

    def __init__(self, channels: int, latents: int, entry: TopKFamily, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.k, self.auxk_weight, self.dead_rows = entry.k, entry.auxk_weight, entry.dead_rows
        self.silent_F = torch.zeros(latents, dtype=torch.int64, device=device)
        """Rows since a latent fired."""
        self._pre_BF = torch.empty(entry.batch_rows, latents, device=device)

    def counters(self) -> dict[str, Tensor]:
        return {"silent_F": self.silent_F}

    def backward(self, acts_BD: Tensor, strength: float = 1.0) -> Figures:
        rows, latents = len(acts_BD), len(self.W_dec_FD)
        pre_BF = self.encode(acts_BD)
        code = self.select(pre_BF, strength)
        writing, error_BD, grad_BMD = self.reconstruct(code, acts_BD)
        grad_RD = grad_BMD.flatten(0, 1)
        grad_N = writing.products(grad_RD, self.W_dec_FD).mul_(code.value_N > 0)
        order_N, first_F = code.by_latent(latents)
        self.W_dec_FD.grad = sum_by_latent(order_N, first_F, writing.row_N, code.value_N, grad_RD)
        self.W_enc_FD.grad = sum_by_latent(order_N, first_F, code.row_N, grad_N, acts_BD)
        self.b_enc_F.grad = torch.zeros_like(self.b_enc_F).index_add_(0, code.latent_N, grad_N)
        self.b_dec_D.grad = grad_BMD[:, 0].sum(0)
        self._count(code, rows)
        dead_A = torch.nonzero(self.silent_F > self.dead_rows).view(-1)
        if self.auxk_weight and len(dead_A):
            self._add_auxk(dead_A, pre_BF, acts_BD, error_BD)
        without_parallel_part(self.W_dec_FD.grad, self.W_dec_FD, self.models)
        return {
            "mse": error_BD.square().mean(),
            "l1": code.value_N.sum() / rows,
            "l0": code.value_N.sign().sum() / rows,
            "dead_share": (self.silent_F > self.dead_rows).float().mean(),
        }

    def encode(self, acts_BD: Tensor) -> Tensor:
        """Pre-activations [B, F], in one buffer; the only product whose time `precision` changes, since others are sparse."""
        if self.dtype == torch.float32:
            return torch.addmm(self.b_enc_F, acts_BD, self.W_enc_FD.T, out=self._pre_BF)
        without_bias_BF = torch.mm(acts_BD.to(self.dtype), self.W_enc_FD.to(self.dtype).T)
        return torch.add(without_bias_BF, self.b_enc_F, out=self._pre_BF)

    def k_now(self, strength: float) -> float:
        """Latents per row while k falls from the channels to its value."""
        return self.k + (1 - strength) * max(0, self.W_dec_FD.shape[1] - self.k)

    def select(self, pre_BF: Tensor, strength: float) -> SparseCode:
        """The active latents of a batch."""
        return largest_of_rows(pre_BF, round(self.k_now(strength)))

    def reconstruct(self, code: SparseCode, acts_BD: Tensor) -> tuple[SparseCode, Tensor, Tensor]:
        """
        Returns:
            the code by the rows of R, the error x̂ - x [B, D], and the gradients of what the latents write [B, M, D]; the
            first of the M is that of b_dec too.
        """
        error_BD = code.decode(self.W_dec_FD).add_(self.b_dec_D).sub_(acts_BD)
        return code, error_BD, (error_BD * (2 / error_BD.numel()))[:, None]

    def _count(self, code: SparseCode, rows: int) -> None:
        longest = torch.iinfo(torch.int64).max
        since_N = torch.where(code.value_N > 0, 0, longest)
        self.silent_F.add_(rows).scatter_reduce_(0, code.latent_N, since_N, "amin")

    def _add_auxk(self, dead_A: Tensor, pre_BF: Tensor, acts_BD: Tensor, error_BD: Tensor) -> None:
        """Add the gradients of the auxk term."""
        W_dec_AD, residual_BD = self.W_dec_FD[dead_A], -error_BD
        latents_BA = pre_BF[:, dead_A].relu_()
        if len(dead_A) > (most := acts_BD.shape[1] // 2):
            latents_BA = activation_functions.TopK(most)(latents_BA)
        variance = (residual_BD - residual_BD.mean(0)).square().sum()
        grad_BD = (latents_BA @ W_dec_AD).sub_(residual_BD).mul_(2 * self.auxk_weight / variance)
        grad_BA = (grad_BD @ W_dec_AD.T).mul_(latents_BA > 0)
        for parameter, grad in (
            (self.W_dec_FD, latents_BA.T @ grad_BD),
            (self.W_enc_FD, grad_BA.T @ acts_BD),
            (self.b_enc_F, grad_BA.sum(0)),
        ):
            parameter.grad.index_add_(0, dead_A, grad)  # type: ignore[union-attr]

    def constrain(self) -> None:
        self.W_dec_FD.div_(lengths(self.W_dec_FD, self.models).clamp_min_(1e-12)[:, None])

    def activation(self) -> ActivationFunction:
        return activation_functions.TopK(self.k)
