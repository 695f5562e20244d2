"""The code of a batch and its products, which go through the active latents alone where they are few.

Shapes: B rows, F latents, E columns of any target.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

SPARSE_DENSITY = 0.02
"""Share of active latents up to which a CPU is faster with the active ones alone."""
GRAM_ROWS = 65_536
"""Rows whose sparse codes are multiplied at once."""


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


class SparseCode:
    """The same on a CPU, with only the active latents of each row stored."""

    def __init__(self, latents_BF: Tensor) -> None:
        self.rows, self.latents = latents_BF.shape
        row_N, latent_N = latents_BF.nonzero(as_tuple=True)
        first_B = torch.nn.functional.pad(torch.bincount(row_N, minlength=self.rows).cumsum(0), (1, 0))
        entries = latents_BF[row_N, latent_N], latent_N.int(), first_B.int()
        self.latents_BF = csr_array(tuple(part.numpy() for part in entries), latents_BF.shape)
        self.bytes = self.latents_BF.data.nbytes + self.latents_BF.indices.nbytes

    def firings(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.latents_BF.indices, minlength=self.latents))

    def sum(self) -> Tensor:
        return torch.from_numpy(self.latents_BF.sum(0, dtype=np.float64))

    def cross(self, target_BE: Tensor) -> Tensor:
        return torch.from_numpy(self.latents_BF.T @ target_BE.numpy())

    def decode(self, writes_FE: Tensor) -> Tensor:
        return torch.from_numpy(self.latents_BF @ writes_FE.numpy())


Code = DenseCode | SparseCode


def code_of(latents_BF: Tensor) -> Code:
    """The cheaper form of a code."""
    few = torch.count_nonzero(latents_BF) <= SPARSE_DENSITY * latents_BF.numel()
    return SparseCode(latents_BF) if few and latents_BF.device.type == "cpu" else DenseCode(latents_BF)


class Gram:
    """Σ fᵀf over batches, in float64; sparse ones are gathered first, since each product fills a whole matrix."""

    def __init__(self, latents: int, device: torch.device) -> None:
        self._total_FF = torch.zeros(latents, latents, dtype=torch.float64, device=device)
        self._waiting: list[SparseCode] = []

    def add(self, code: Code) -> None:
        if isinstance(code, DenseCode):
            self._total_FF += code.latents_BF.T @ code.latents_BF
            return
        self._waiting.append(code)
        if sum(waiting.rows for waiting in self._waiting) >= GRAM_ROWS:
            self._multiply()

    def total(self) -> Tensor:
        """The sum so far [F, F]."""
        if self._waiting:
            self._multiply()
        return self._total_FF

    def _multiply(self) -> None:
        all_BF = vstack([code.latents_BF for code in self._waiting], format="csr")
        self._total_FF += torch.from_numpy((all_BF.T @ all_BF).toarray())
        self._waiting.clear()
