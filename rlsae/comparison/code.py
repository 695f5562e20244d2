"""The code of a batch and its products, which go through the active latents alone where they are few.

Shapes: B rows, F latents, E columns of any target.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from rlsae.sae import compiled
from rlsae.sae.activation_functions import TopK
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.sparse_code import SparseCode, largest_of_rows

SPARSE_DENSITY = 0.08
"""Share of active latents up to which a CPU is faster with the active ones alone."""


class DenseCode:
    """A code of which every entry is stored."""

    def __init__(self, latents_BF: Tensor) -> None:
        self.latents_BF = latents_BF
        self.rows, self.latents = latents_BF.shape
        self.bytes = latents_BF.nbytes

    def firings(self) -> Tensor:
        """Rows on which each latent is active [F]."""
        return (self.latents_BF > 0).sum(0)

    def sum(self) -> Tensor:
        """Sum over rows [F]."""
        return self.latents_BF.sum(0, dtype=torch.float64)

    def cross(self, target_BE: Tensor) -> Tensor:
        """fᵀy [F, E]."""
        return self.latents_BF.T @ target_BE

    def decode(self, writes_FE: Tensor) -> Tensor:
        """f W [B, E]."""
        return self.latents_BF @ writes_FE


class CompressedCode:
    """The same on a CPU, with only the active latents of each row stored."""

    def __init__(self, latents_BF: csr_array) -> None:
        self.latents_BF = latents_BF
        self.rows, self.latents = latents_BF.shape
        self.bytes = self.latents_BF.data.nbytes + self.latents_BF.indices.nbytes

    @classmethod
    def of(cls, code: SparseCode, latents: int) -> CompressedCode:
        """The positive entries of a code."""
        active_N = code.value_N > 0
        ends_B = torch.bincount(code.row_N[active_N], minlength=len(code.first_R)).cumsum(0)
        ends_B = torch.nn.functional.pad(ends_B, (1, 0)).int()
        entries = code.value_N[active_N], code.latent_N[active_N].int(), ends_B
        return cls(csr_array(tuple(part.numpy() for part in entries), (len(code.first_R), latents)))

    def firings(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.latents_BF.indices, minlength=self.latents))

    def sum(self) -> Tensor:
        return torch.from_numpy(self.latents_BF.sum(0, dtype=np.float64))

    def cross(self, target_BE: Tensor) -> Tensor:
        return torch.from_numpy(self.latents_BF.T @ target_BE.numpy())

    def decode(self, writes_FE: Tensor) -> Tensor:
        return torch.from_numpy(self.latents_BF @ writes_FE.numpy())


Code = DenseCode | CompressedCode


def encode(sae: SparseAutoencoder, acts_BD: Tensor) -> Code:
    """The code of some rows, in its cheaper form."""
    if acts_BD.device.type == "cpu" and isinstance(sae.activation, TopK) and sae.activation.k <= SPARSE_DENSITY * sae.latents:
        return CompressedCode.of(largest_of_rows(sae.pre_activations(acts_BD), sae.activation.k), sae.latents)
    return code_of(sae.encode(acts_BD))


def code_of(latents_BF: Tensor) -> Code:
    """The cheaper form of a code."""
    few = torch.count_nonzero(latents_BF) <= SPARSE_DENSITY * latents_BF.numel()
    if not few or latents_BF.device.type != "cpu":
        return DenseCode(latents_BF)
    row_N, latent_N = latents_BF.nonzero(as_tuple=True)
    first_B = torch.searchsorted(row_N, torch.arange(len(latents_BF)))
    return CompressedCode.of(SparseCode(latents_BF[row_N, latent_N], latent_N, row_N, first_B), latents_BF.shape[1])


class Gram:
    """Σ fᵀf over batches, in float64."""

    def __init__(self, latents: int, device: torch.device) -> None:
        self.total_FF = torch.zeros(latents, latents, dtype=torch.float64, device=device)

    def add(self, code: Code) -> None:
        if isinstance(code, DenseCode):
            self.total_FF += code.latents_BF.T @ code.latents_BF
        else:
            compiled.add_gram(code.latents_BF, self.total_FF)
