"""What the linear map that all latents share does: its principal directions, in the model's own words.

The map of rank r moves a centred base row x by x B v_1 v_1ᵀ + … + x B v_r v_rᵀ (rlsae/comparison/linear_map.py). Of each
direction v this tells what it writes (logit lens: the tokens that W_U v raises and lowers), where it is written (the tokens at
which the coordinate x B v is largest on average), and whether documents in which it is written more are rewarded more.
Shapes: N rows, D channels, R directions, V vocabulary, T documents.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.activations.store import ActivationStore
from rlsae.comparison.linear_map import LinearMaps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.interpretation.logit_lens import TOKENS, raised_and_lowered
from rlsae.rewards import Reward
from rlsae.statistics import bootstrap_weights

DIRECTIONS = 8
"""At most so many are told."""
MIN_COUNT = 20
"""Occurrences below which a token's mean coordinate says little."""
COLUMNS = [
    "layer", "direction", "share", "raises", "lowers", "written_at", "reward_correlation", "reward_correlation_low",
    "reward_correlation_high",
]  # fmt: skip


@torch.inference_mode()
def map_directions(
    rows: PairedRows,
    maps: LinearMaps,
    rank: int,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards_T: NDArray[np.float64],
) -> pd.DataFrame:
    """A row of `COLUMNS` for each of the first directions of a layer's map.

    Args:
        rank: of the map that the layer's latents share; no more directions than that are told.
        rewards_T: of the documents of the stores.
    """
    where = next(base.parameters()).device
    count = min(rank, DIRECTIONS)
    directions_DR = maps.directions_DD[:, :count]
    # The sign of a principal direction is arbitrary: let the mean be shifted along it.
    directions_DR = directions_DR * torch.where((maps.mean_tuned_D - maps.mean_base_D) @ directions_DR < 0, -1.0, 1.0)
    moved_NR = _coordinates(rows, maps, maps.slope_DD @ directions_DR, where)
    raised_RK, lowered_RK = raised_and_lowered(base, directions_DR.T)
    token_N = rows.base.group["token"][:]
    documents = np.diff(rows.base.start) > 0
    means_TR = np.add.reduceat(moved_NR, rows.base.start[:-1][documents]) / np.diff(rows.base.start)[documents, None]
    table = []
    for direction in range(count):
        correlation, low, high = correlation_ci95(means_TR[:, direction], rewards_T[documents])
        table.append(
            {
                "layer": rows.layer,
                "direction": direction,
                "share": float(maps.explained_D[direction]),
                "raises": _named(raised_RK[direction], tokenizer),
                "lowers": _named(lowered_RK[direction], tokenizer),
                "written_at": _named(_largest_means(token_N, moved_NR[:, direction]), tokenizer),
                "reward_correlation": correlation,
                "reward_correlation_low": low,
                "reward_correlation_high": high,
            }
        )
    return pd.DataFrame(table, columns=COLUMNS)


def document_rewards(store: ActivationStore, tokenizer: PreTrainedTokenizerBase, reward: Reward) -> NDArray[np.float64]:
    """Reward of each document of a store, as a response to an empty prompt."""
    token_N, start = store.group["token"][:], store.start
    texts = [tokenizer.decode(token_N[low:high]) for low, high in itertools.pairwise(start)]
    return np.asarray(reward([""] * len(texts), texts), float)


def correlation_ci95(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[float, float, float]:
    """Pearson's correlation with its 95 % bootstrap interval; nan where one of both is constant."""
    if not x.std() or not y.std():
        return (float("nan"),) * 3
    centred = np.stack([x - x.mean(), y - y.mean()])
    products = np.stack([np.ones_like(x), *centred, centred[0] ** 2, centred[1] ** 2, centred[0] * centred[1]])

    def of(weights: NDArray[np.floating]) -> NDArray[np.floating]:
        one, a, b, aa, bb, ab = products @ weights.T
        return (ab / one - a * b / one**2) / np.sqrt((aa / one - (a / one) ** 2) * (bb / one - (b / one) ** 2))

    low, high = np.nanpercentile(of(bootstrap_weights(len(x))), [2.5, 97.5])
    return float(of(np.ones((1, len(x))))[0]), float(low), float(high)


def _coordinates(rows: PairedRows, maps: LinearMaps, in_DR: Tensor, where: torch.device) -> NDArray[np.float64]:
    """How far each row is moved along each direction [N, R]."""
    mean_D, in_DR = maps.mean_base_D.float(), in_DR.float()
    parts = [(base_BD - mean_D) @ in_DR for _, base_BD, _, _ in rows.batches(where)]
    return torch.cat(parts).double().cpu().numpy()


def _largest_means(token_N: NDArray[np.int32], value_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Tokens at which a value is largest on average."""
    count_V = np.bincount(token_N)
    mean_V = np.bincount(token_N, value_N) / np.maximum(count_V, 1)
    return np.argsort(-np.where(count_V >= MIN_COUNT, mean_V, -np.inf), kind="stable")[:TOKENS]


def _named(tokens: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> str:
    return " ".join(f"‹{tokenizer.decode([int(token)])}›" for token in tokens)
