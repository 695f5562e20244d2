"""Rows of base and tuned on the same tokens, side by side and in groups of documents. Shapes: B rows, D channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlsae.activations.store import ActivationStore
from rlsae.errors import RlsaeError

GROUPS = 32
"""Groups of documents between which variances are estimated."""
MIN_GROUPS = 16
ROWS = 8192
"""Rows that are read at once."""


class Batch(NamedTuple):
    """Some rows of one group of documents."""

    group: int
    base_BD: Tensor
    tuned_BD: Tensor
    held_out_B: Tensor


class PairedRows:
    """The rows of one layer in two stores of the same tokens.

    Documents are shuffled when they are tokenised, so groups of neighbouring documents are random samples. All tokens of a
    document fall into one group: groups are independent of each other, tokens are not.

    Raises:
        RlsaeError: the stores hold other tokens than each other, or too few documents to estimate a variance.
    """

    def __init__(self, base: ActivationStore, tuned: ActivationStore, layer: int) -> None:
        base.check_same_tokens(tuned)
        self.base, self.tuned, self.layer = base, tuned, layer
        self.rows, self.channels = base.acts(layer).shape
        documents = np.unique(np.searchsorted(base.start, np.linspace(0, base.rows, GROUPS + 1)))
        self.edges = base.start[documents]
        """First row of each group, and the end."""
        if len(self.edges) - 1 < MIN_GROUPS:
            raise RlsaeError(
                f"{base.path} holds {len(base.start) - 1} documents; a variance between documents needs {MIN_GROUPS}: "
                "raise the activation's rows"
            )

    @property
    def groups(self) -> int:
        return len(self.edges) - 1

    def batches(self, where: torch.device) -> Iterator[Batch]:
        """All rows in the order of the stores."""
        held_out = torch.from_numpy(self.base.held_out_rows())
        for group in range(self.groups):
            for first in range(self.edges[group], self.edges[group + 1], ROWS):
                stop = min(first + ROWS, self.edges[group + 1])
                both = [torch.from_numpy(store.read(self.layer, first, stop)) for store in (self.base, self.tuned)]
                base_BD, tuned_BD = (acts_BD.to(where, torch.float32) for acts_BD in both)
                yield Batch(group, base_BD, tuned_BD, held_out[first:stop].to(where))
