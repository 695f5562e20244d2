"""Windows: short stretches of documents, some where a latent fires and some where it does not.

Every document of a store is cut into consecutive windows of equal length (the last is shorter). An explanation is drawn from
windows of training documents and judged on windows of held-out ones (as in delphi: activating windows from all quantiles of
activation, not the strongest alone, beside silent ones, of which half are near misses). Shapes: W windows, T positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlsae.activations.store import ActivationStore

QUANTILES = 5
"""Strata of the largest activation in a window from which windows are drawn evenly."""
NEAR_MISS_TOKENS = 20
"""Tokens at which a latent fires most often, by lift, that make a silent window a near miss."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, and one latent's activations there."""

    document: int
    held_out: bool
    tokens: tuple[str, ...]
    """Texts of the tokens."""
    ids: NDArray[np.int64]
    """[T]"""
    acts: NDArray[np.float32]
    """[T]"""
    position: int = 0
    """Place of its first token in the document."""
    before: int = -1
    """The token before it; -1 at the start of a document."""

    @property
    def fires(self) -> bool:
        return bool((self.acts > 0).any())


@dataclass(frozen=True)
class Cuts:
    """All windows of a store's documents, as ranges of rows."""

    token_N: NDArray[np.int64]
    first_W: NDArray[np.int64]
    last_W: NDArray[np.int64]
    """Rows first … last − 1."""
    document_W: NDArray[np.int64]
    held_out_W: NDArray[np.bool_]

    @classmethod
    def of(cls, store: ActivationStore, length: int) -> Cuts:
        """Cut each document of a store into windows of `length` rows; what remains is a shorter one."""
        ranges = [
            (first, min(first + length, high), document)
            for document, (low, high) in enumerate(itertools.pairwise(store.start.tolist()))
            for first in range(low, high, length)
        ]
        first_W, last_W, document_W = np.array(ranges, np.int64).reshape(-1, 3).T
        held_out = np.asarray(store.held_out, bool)
        return cls(store.group["token"][:].astype(np.int64), first_W, last_W, document_W, held_out[document_W])

    def __len__(self) -> int:
        return len(self.first_W)

    @cached_property
    def window_N(self) -> NDArray[np.int64]:
        """The window of each row."""
        return np.repeat(np.arange(len(self)), self.last_W - self.first_W)

    def largest(self, acts_N: NDArray[np.floating]) -> NDArray[np.floating]:
        """The largest activation in each window [W]."""
        return np.maximum.reduceat(acts_N, self.first_W) if len(self) else acts_N[:0]

    def with_any(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Windows that hold one of these tokens [W]."""
        held_W = np.zeros(len(self), bool)
        held_W[self.window_N[np.isin(self.token_N, tokens)]] = True
        return held_W


def fired_at(cuts: Cuts, acts_N: NDArray[np.floating], rows_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The tokens at which a latent fires most often among some rows, relative to its density there: by lift."""
    fired_V = np.bincount(cuts.token_N[rows_N & (acts_N > 0)])
    count_V = np.bincount(cuts.token_N[rows_N], minlength=len(fired_V))[: len(fired_V)]
    # One firing too few for rare tokens: a token seen once would lead otherwise.
    lift_V = np.maximum(fired_V - 1, 0) / np.maximum(count_V, 1)
    order = np.argsort(-lift_V, kind="stable")[:NEAR_MISS_TOKENS]
    return order[lift_V[order] > 0]


def draw(
    cuts: Cuts,
    acts_N: NDArray[np.floating],
    held_out: bool,
    count: int,
    near_tokens: NDArray[np.int64],
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows in which a latent fires, and about as many silent ones, of training or of held-out documents.

    Args:
        count: at most so many of each.
        near_tokens: a silent window that holds one of them is a near miss; these are half of the silent ones where there are
            enough.

    Returns:
        activating, evenly from the quantiles of their largest activation; silent, as many of each length, or a longer window
        would be the likelier one to fire. Numbers of windows, in order of the store.
    """
    rng = np.random.default_rng(seed)
    largest_W, side_W = cuts.largest(acts_N), cuts.held_out_W == held_out
    active = np.flatnonzero(side_W & (largest_W > 0))
    strata = np.array_split(active[np.argsort(largest_W[active], kind="stable")], QUANTILES)
    # The strongest stratum first: it takes what does not divide evenly.
    sizes = [len(part) for part in np.array_split(np.arange(min(count, len(active))), QUANTILES)]
    taken = [rng.choice(part, min(size, len(part)), replace=False) for part, size in zip(strata[::-1], sizes, strict=True)]
    chosen, silent = np.sort(np.concatenate(taken)), side_W & (largest_W <= 0)
    near_W, length_W = cuts.with_any(near_tokens), cuts.last_W - cuts.first_W
    others = []
    for length, wanted in zip(*np.unique(length_W[chosen], return_counts=True), strict=True):
        able_W = silent & (length_W == length)
        near = rng.permutation(np.flatnonzero(able_W & near_W))[: wanted // 2]
        far = rng.permutation(np.flatnonzero(able_W & ~near_W))[: wanted - len(near)]
        others += [near, far]
    return chosen, np.sort(np.concatenate(others)) if others else chosen
