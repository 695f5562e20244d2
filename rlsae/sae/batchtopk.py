"""The k × B largest latents of a batch of B rows, so that hard rows may use more (Bussmann et al., arXiv 2412.06410).

    f = ReLU(x W_encᵀ + b_enc) where it is among the k·B largest of the batch, 0 elsewhere;   x̂ and L as of topk

Without a batch, f_i is active above a threshold: the running mean of the smallest value that a batch keeps. So it is
exported as a JumpReLU dictionary. Shapes: B rows, F latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsae.config import TopKFamily
from rlsae.sae.activation_functions import ActivationFunction, JumpReLU
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.sparse_code import SparseCode, largest_of_batch
from rlsae.sae.topk import TopK

THRESHOLD_DECAY = 0.9
"""Of the running mean."""


class BatchTopK(TopK):
    def __init__(self, channels: int, latents: int, entry: TopKFamily, seed: int, device: torch.device) -> None:
        super().__init__(channels, latents, entry, seed, device)
        self.threshold = torch.zeros((), dtype=torch.float64, device=device)
        self._last_cut = 0.0

    def counters(self) -> dict[str, Tensor]:
        return super().counters() | {"threshold": self.threshold}

    def select(self, pre_BF: Tensor, strength: float) -> SparseCode:
        code = largest_of_batch(pre_BF, round(self.k_now(strength) * len(pre_BF)), self._last_cut)
        cut = torch.where(code.value_N > 0, code.value_N, torch.inf).min().double()
        cut = torch.where(cut.isfinite(), cut, self.threshold)
        mean = torch.where(self.threshold > 0, self.threshold.lerp(cut, 1 - THRESHOLD_DECAY), cut)
        self.threshold.copy_(mean)
        if pre_BF.device.type == "cpu":
            self._last_cut = cut.item()
        return code

    def activation(self) -> ActivationFunction:
        return JumpReLU(self.threshold.float().expand(len(self.b_enc_F)))

    def load(self, sae: SparseAutoencoder) -> None:
        super().load(sae)
        assert isinstance(sae.activation, JumpReLU)
        self.threshold.copy_(sae.activation.threshold_F.max())
