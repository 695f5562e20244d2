"""BatchTopK whose first latents must do without the later ones (Bussmann et al., arXiv 2503.17547).

    x̂_m = Σ_{i < n_m} f_i W_dec,i + b_dec   for M prefixes n_1 < … < n_M = F of the dictionary, f as of batchtopk
    L = mean over m, rows and channels of (x - x̂_m)²  +  auxk as of topk

Early latents learn what is common, and are not broken up by rarer ones. What a latent writes enters every x̂_m from its own
prefix on, so its gradient is the sum of theirs. Shapes: B rows, D channels, F latents, M prefixes, N entries of the code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import MatryoshkaDictionary
from rlsae.sae.batchtopk import BatchTopK
from rlsae.sae.sparse_code import SparseCode


class Matryoshka(BatchTopK):
    def __init__(self, channels: int, latents: int, entry: MatryoshkaDictionary, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.ends_M = torch.tensor([max(1, round(share * latents)) for share in entry.prefixes], device=device)

    def reconstruct(self, code: SparseCode, acts_BD: Tensor) -> tuple[SparseCode, Tensor, Tensor]:
        (rows, channels), prefixes = acts_BD.shape, len(self.ends_M)
        part_N = code.row_N * prefixes + torch.searchsorted(self.ends_M, code.latent_N, right=True)
        first_R = torch.searchsorted(part_N, torch.arange(rows * prefixes, device=part_N.device))
        by_part = SparseCode(code.value_N, code.latent_N, part_N, first_R)
        parts_BMD = by_part.decode(self.W_dec_FD).view(rows, prefixes, channels)
        error_BMD = parts_BMD.cumsum(1).add_(self.b_dec_D).sub_(acts_BD[:, None])
        grad_BMD = error_BMD.flip(1).cumsum(1).flip(1).mul_(2 / error_BMD.numel())
        return by_part, error_BMD[:, -1], grad_BMD
