"""A batch of latents of which few are active, as the list of its entries, and the products that a training step needs of it.

Each product visits the entries alone: at k = 32 of 2,048 latents they are 1.6 % of a dense code. Shapes: N entries of the
code, R rows that write (those of the batch, or several for each), B rows, D channels, F latents.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# They are only the index of a product here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

SURVIVORS = 0.9
"""Share of the last batch's smallest kept value above which entries are looked for first."""


class SparseCode(NamedTuple):
    """Entries in the order of their rows."""

    value_N: Tensor
    latent_N: Tensor
    row_N: Tensor
    first_R: Tensor
    """Where the entries of each row begin."""

    def decode(self, W_FD: Tensor) -> Tensor:
        """What each row writes, [R, D]: the sum of its latents' directions times their values."""
        return embedding_bag(self.latent_N, W_FD, self.first_R, mode="sum", per_sample_weights=self.value_N)

    def products(self, grad_RD: Tensor, W_FD: Tensor) -> Tensor:
        """grad_r · W_f at each entry [N]: the gradient of its value."""
        ends = torch.cat([self.first_R, self.first_R.new_tensor([len(self.value_N)])])
        size = (len(grad_RD), len(W_FD))
        places = torch.sparse_csr_tensor(ends, self.latent_N, self.value_N, size, check_invariants=False)
        return torch.sparse.sampled_addmm(places, grad_RD, W_FD.T, beta=0).values()

    def by_latent(self, latents: int) -> tuple[Tensor, Tensor]:
        """Order of the entries by latent [N], and where those of each latent begin in it [F]."""
        sorted_N, order_N = torch.sort(self.latent_N.int(), stable=True)
        first_F = torch.searchsorted(sorted_N, torch.arange(latents, dtype=torch.int32, device=sorted_N.device))
        return order_N, first_F


def sum_by_latent(order_N: Tensor, first_F: Tensor, row_N: Tensor, weight_N: Tensor, rows_RD: Tensor) -> Tensor:
    """Σ of weight times row over the entries of each latent [F, D]: the gradient of its encoder or decoder row."""
    return embedding_bag(row_N[order_N], rows_RD, first_F, mode="sum", per_sample_weights=weight_N[order_N])


def largest_of_rows(pre_BF: Tensor, k: int) -> SparseCode:
    """The k largest of each row."""
    rows, k = len(pre_BF), min(k, pre_BF.shape[1])
    value_BK, latent_BK = pre_BF.topk(k, dim=1, sorted=False)
    first_B = torch.arange(0, rows * k, k, device=pre_BF.device)
    row_N = torch.arange(rows, device=pre_BF.device).repeat_interleave(k)
    return SparseCode(value_BK.view(-1).relu_(), latent_BK.view(-1), row_N, first_B)


def largest_of_batch(pre_BF: Tensor, count: int, last_cut: float) -> SparseCode:
    """The `count` largest of a whole batch.

    Args:
        last_cut: smallest positive value that the batch before kept; a guess, which decides the time and not the result.
    """
    rows, latents = pre_BF.shape
    place_N = _places_of_largest(pre_BF.view(-1), min(count, pre_BF.numel()), SURVIVORS * last_cut)
    row_N = place_N.div(latents, rounding_mode="floor")
    first_B = torch.searchsorted(row_N, torch.arange(rows, device=row_N.device))
    return SparseCode(pre_BF.view(-1)[place_N].relu_(), place_N - row_N * latents, row_N, first_B)


def _places_of_largest(pre_N: Tensor, count: int, guess: float) -> Tensor:
    """Their places, rising. On the CPU a selection among the few values above a guess takes a twentieth of that among all."""
    if pre_N.device.type == "cpu" and guess > 0:
        values = pre_N.numpy()
        survivors = np.flatnonzero(values > guess)
        if len(survivors) >= count:
            surplus = len(survivors) - count
            kept = survivors[np.argpartition(values[survivors], surplus)[surplus:]]
            return torch.from_numpy(np.sort(kept))
    return pre_N.topk(count, sorted=False).indices.sort().values
