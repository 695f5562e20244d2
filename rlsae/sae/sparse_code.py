"""A batch of latents of which few are active, as the list of its entries, and the products that a training step needs of it.

Each product visits the entries alone: at k = 32 of 2,048 latents they are 1.6 % of a dense code. Shapes: N entries of the
code, R rows that write (those of the batch, or several for each), B rows, D channels, F latents, T rows of a table.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from rlsae.sae import compiled

# They are only the index of a product here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

SURVIVORS = 0.95
"""Share of the last batch's smallest kept value above which entries are looked for first."""
CACHED = 2**18
"""Numbers of a table that a core has close at hand while it reads them again and again."""


class SparseCode(NamedTuple):
    """Entries in the order of their rows."""

    value_N: Tensor
    latent_N: Tensor
    row_N: Tensor
    first_R: Tensor
    """Where the entries of each row begin."""

    def decode(self, W_FD: Tensor) -> Tensor:
        """What each row writes, [R, D]: the sum of its latents' directions times their values."""
        return _weighted_sums(self.latent_N, self.value_N, self.first_R, W_FD)

    def products(self, grad_RD: Tensor, W_FD: Tensor) -> Tensor:
        """grad_r · W_f at each entry [N]: the gradient of its value."""
        ends = torch.cat([self.first_R, self.first_R.new_tensor([len(self.value_N)])])
        size = (len(grad_RD), len(W_FD))
        places = torch.sparse_csr_tensor(ends, self.latent_N, self.value_N, size, check_invariants=False)
        return torch.sparse.sampled_addmm(places, grad_RD, W_FD.T, beta=0).values()

    def by_latent(self, latents: int) -> tuple[Tensor, Tensor]:
        """Order of the entries by latent [N], and where those of each latent begin in it [F]."""
        if self.latent_N.device.type == "cpu":
            return compiled.sort_by_latent(self.latent_N, latents)
        sorted_N, order_N = torch.sort(self.latent_N.int(), stable=True)
        first_F = torch.searchsorted(sorted_N, torch.arange(latents, dtype=torch.int32, device=sorted_N.device))
        return order_N, first_F


def sum_by_latent(order_N: Tensor, first_F: Tensor, row_N: Tensor, weight_N: Tensor, rows_RD: Tensor) -> Tensor:
    """Σ of weight times row over the entries of each latent [F, D]: the gradient of its encoder or decoder row."""
    return _weighted_sums(row_N[order_N], weight_N[order_N], first_F, rows_RD)


def _weighted_sums(place_N: Tensor, weight_N: Tensor, first: Tensor, table_TD: Tensor) -> Tensor:
    """Σ of weight times row of the table over each stretch of entries; on the CPU by as many channels as its cache holds."""
    rows, channels = table_TD.shape
    width = max(32, CACHED // rows)
    if table_TD.device.type != "cpu" or channels < 2 * width or len(place_N) < 8 * rows:
        return embedding_bag(place_N, table_TD, first, mode="sum", per_sample_weights=weight_N)
    sums = table_TD.new_empty(len(first), channels)
    for part, some in zip(sums.split(width, 1), table_TD.split(width, 1), strict=True):
        part.copy_(embedding_bag(place_N, some.contiguous(), first, mode="sum", per_sample_weights=weight_N))
    return sums


def largest_of_rows(pre_BF: Tensor, k: int) -> SparseCode:
    """The k largest of each row; where fewer are positive, entries with the value 0 fill it up."""
    rows, k = len(pre_BF), min(k, pre_BF.shape[1])
    if compiled.serves(pre_BF):
        value_BK, latent_BK = compiled.largest_of_rows(pre_BF, k)
    else:
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
    if compiled.serves(pre_BF):
        value_N, latent_N, row_N = compiled.largest_of_batch(pre_BF, count, SURVIVORS * last_cut)
    else:
        place_N = pre_BF.view(-1).topk(min(count, pre_BF.numel()), sorted=False).indices.sort().values
        row_N = place_N.div(latents, rounding_mode="floor")
        value_N, latent_N = pre_BF.view(-1)[place_N].relu_(), place_N - row_N * latents
    return SparseCode(value_N, latent_N, row_N, torch.searchsorted(row_N, torch.arange(rows, device=row_N.device)))
