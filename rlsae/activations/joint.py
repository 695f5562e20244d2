"""The rows of a base and a tuned model on the same tokens as those of one store, for dictionaries that read both.

    both         [x_base, x_tuned]     2D channels, base first: a dictionary of these rows is a crosscoder
    difference   x_tuned - x_base      D channels

Whatever reads a store reads these, in the same order of rows. Shapes: N rows, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlsae.activations.store import ActivationStore

Reads = Literal["own", "both", "difference"]
"""What a dictionary reads: the rows of its own policy, or rows of both."""
BLOCK = 1 << 16
"""Rows of which sums are taken at once."""


def join(reads: str, base_ND: Tensor, tuned_ND: Tensor) -> Tensor:
    """Rows [N, 2D] of `both`, or [N, D] of `difference`, in float32."""
    base_ND, tuned_ND = base_ND.float(), tuned_ND.float()
    return torch.cat([base_ND, tuned_ND], -1) if reads == "both" else tuned_ND - base_ND


@dataclass(frozen=True)
class JointArray:
    """What is asked of the array of a layer before it is read."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]


class JointStore(ActivationStore):
    """Two stores of the same tokens, read as one.

    Args:
        reads: `both` or `difference`.

    Raises:
        RlsaeError: the stores hold other tokens than each other.
    """

    def __init__(self, base: ActivationStore, tuned: ActivationStore, reads: str) -> None:
        base.check_same_tokens(tuned)
        self.base, self.tuned, self.reads = base, tuned, reads
        self.path, self.group, self.layers = tuned.path, tuned.group, tuned.layers
        self.start, self.held_out = tuned.start, tuned.held_out

    def acts(self, layer: int) -> JointArray:
        rows, channels = self.tuned.acts(layer).shape
        width, dtype = (2 * channels, self.tuned.acts(layer).dtype) if self.reads == "both" else (channels, np.dtype("float32"))
        return JointArray((rows, width), dtype, self.tuned.acts(layer).chunks)

    def read_chunk(self, layer: int, chunk: int, out_ND: NDArray[Any], skipped: int = 0) -> None:
        array = self.tuned.acts(layer)
        base_ND, tuned_ND = np.empty((2, len(out_ND), array.shape[1]), array.dtype)
        self.base.read_chunk(layer, chunk, base_ND, skipped)
        self.tuned.read_chunk(layer, chunk, tuned_ND, skipped)
        if self.reads == "both":
            np.concatenate([base_ND, tuned_ND], axis=1, out=out_ND)
        else:
            np.subtract(tuned_ND, base_ND, out=out_ND, dtype=np.float32)

    def statistics(self, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        means_D, squares_D = zip(*(store.statistics(layer) for store in (self.base, self.tuned)), strict=True)
        if self.reads == "both":
            return np.concatenate(means_D), np.concatenate(squares_D)
        square_D = np.zeros_like(means_D[0])
        for first in range(0, self.rows, BLOCK):
            square_D += np.square(self.read(layer, first, first + BLOCK), dtype=np.float64).sum(0)
        return means_D[1] - means_D[0], square_D / self.rows


def rows_of(reads: str, role: str, stores: dict[str, ActivationStore]) -> ActivationStore:
    """The rows that a dictionary reads: those of its role, or of both models.

    Args:
        stores: of base and tuned, by role.
    """
    return stores[role] if reads == "own" else JointStore(stores["base"], stores["tuned"], reads)
