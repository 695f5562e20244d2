"""Which layer carries the behaviour: what one layer of the tuned model does inside the base, and the reverse.

    kl_swap_in        KL(base with the tuned layer ‖ base) of the next token: what the layer brings by itself
    kl_swap_out       KL(tuned ‖ tuned with the base's layer): what is lost without it
    reward_swap_in    reward of the base with the tuned layer, less that of the base
    reward_swap_out   reward of the tuned model, less that of the tuned model with the base's layer

KL in nats per token over held-out documents, exact over the vocabulary; rewards of sampled responses to held-out prompts, each
model from the same prompts and seeds. The layer swapped is the whole block, which makes this activation patching with weights
in the place of activations (Meng et al. 2022, arXiv 2202.05262, patch the latter).
Shapes: B documents, T positions, V tokens, L layers, N units (documents or prompts) that intervals resample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.activations.extract import padded
from rlsae.activations.tokens import Tokens
from rlsae.config import Tuning
from rlsae.divergence.table import WHOLE, Array, Measured
from rlsae.errors import RlsaeError
from rlsae.models import blocks, check_same_shape
from rlsae.rewards import Reward
from rlsae.statistics import bootstrap_weights
from rlsae.tuning.fixed_prompts import FixedPrompts

DOCUMENTS = 64
PROMPTS = 128
BATCH_TOKENS = 512
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Sample:
    """What the swaps are measured on: held-out documents, and held-out prompts with the reward of a tuning."""

    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase
    corpus: Path
    """Corpus artifact of the prompts."""
    reward: Reward
    entry: Tuning


def function_divergence(base: PreTrainedModel, tuned: PreTrainedModel, sample: Sample) -> list[Measured]:
    """Every swap measure of each layer.

    Raises:
        RlsaeError: the models have different shapes, or there are no held-out documents.
    """
    check_same_shape(base, tuned, "the tuned model")
    sums_NL, tokens_N = kl_of_swaps(base, tuned, sample.tokens)
    gains_NL = reward_of_swaps(base, tuned, sample)
    found = [_per_unit(measure, values_NL, tokens_N) for measure, values_NL in sums_NL.items()]
    return found + [_per_unit(measure, values_NL, np.ones(len(values_NL))) for measure, values_NL in gains_NL.items()]


def _per_unit(measure: str, values_NL: Array, sizes_N: Array) -> Measured:
    """Σ values / Σ sizes over the units, and in resamples of the units."""
    weights_RN = bootstrap_weights(len(sizes_N))
    resampled_RL = (weights_RN @ values_NL) / (weights_RN @ sizes_N)[:, None]
    return Measured(measure, WHOLE, values_NL.sum(0) / sizes_N.sum(), resampled_RL)


@contextmanager
def swapped(model: PreTrainedModel, other: PreTrainedModel, layer: int) -> Iterator[None]:
    """Within the context one layer of a model is that of another."""
    own, foreign = blocks(model), blocks(other)
    kept = own[layer]
    own[layer] = foreign[layer]
    try:
        yield
    finally:
        own[layer] = kept


@torch.inference_mode()
def kl_of_swaps(base: PreTrainedModel, tuned: PreTrainedModel, tokens: Tokens) -> tuple[dict[str, Array], Array]:
    """Σ KL over the tokens of each document [N, L] for both directions, and the number of tokens of each document [N]."""
    chosen = np.flatnonzero(tokens.held_out)[:DOCUMENTS]
    if not len(chosen):
        raise RlsaeError("held_out: no document is held out to measure layer swaps on; raise the corpus's held_out")
    layers, lengths_N = len(blocks(base)), np.diff(tokens.start)[chosen]
    swap_in_NL, swap_out_NL = np.zeros((2, len(chosen), layers))
    together = max(1, BATCH_TOKENS // int(lengths_N.max()))
    for first in range(0, len(chosen), together):
        rows = slice(first, first + together)
        ids_BT = padded(tokens, chosen[rows].tolist()).to(base.device)
        length_B = torch.from_numpy(lengths_N[rows]).to(base.device)
        real_BT = torch.arange(ids_BT.shape[1], device=base.device) < length_B[:, None]
        base_BTV, tuned_BTV = log_probabilities(base, ids_BT), log_probabilities(tuned, ids_BT)
        for layer in range(layers):
            with swapped(base, tuned, layer):
                swap_in_NL[rows, layer] = kl(log_probabilities(base, ids_BT), base_BTV, real_BT)
            with swapped(tuned, base, layer):
                swap_out_NL[rows, layer] = kl(tuned_BTV, log_probabilities(tuned, ids_BT), real_BT)
    return {"kl_swap_in": swap_in_NL, "kl_swap_out": swap_out_NL}, lengths_N.astype(np.float64)


def reward_of_swaps(base: PreTrainedModel, tuned: PreTrainedModel, sample: Sample) -> dict[str, Array]:
    """Difference of reward at each prompt [N, L] for both directions."""
    prompts = FixedPrompts.draw(sample.corpus, sample.tokenizer, base, sample.entry, sample.reward, PROMPTS)
    base_N, tuned_N = prompts.rewards(base), prompts.rewards(tuned)
    swap_in_NL, swap_out_NL = np.zeros((2, len(base_N), len(blocks(base))))
    for layer in range(len(blocks(base))):
        with swapped(base, tuned, layer):
            swap_in_NL[:, layer] = prompts.rewards(base) - base_N
        with swapped(tuned, base, layer):
            swap_out_NL[:, layer] = tuned_N - prompts.rewards(tuned)
    return {"reward_swap_in": swap_in_NL, "reward_swap_out": swap_out_NL}


def log_probabilities(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Of the next token [B, T, V]; padding stands on the right, where causal attention cannot see it.

    In float64: a KL of 1e-6 is lost in the rounding of float32.
    """
    return model(input_ids=ids_BT, use_cache=False).logits.double().log_softmax(-1)


def kl(left_BTV: Tensor, right_BTV: Tensor, real_BT: Tensor) -> Array:
    """Σ KL(left ‖ right) over the real tokens of each document [B]."""
    kl_BT = (left_BTV.exp() * (left_BTV - right_BTV)).sum(-1)
    return (kl_BT * real_BT).sum(1).cpu().numpy()
