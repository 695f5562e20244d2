"""Which latents raise the reward? The derivative of the expected reward by the gain g_i of every latent at once, at g_i = 1.

With the latent's write scaled, x' = x + Σ_i (g_i - 1) f_i(x) W_dec,i, and responses y drawn from the model, the policy gradient
(Williams 1992) gives

    ∂E[R]/∂g_i = E[(R(y) - b) Σ_t f_i(x_t) ⟨W_dec,i, ∂log p(y)/∂x_t⟩]

b being the mean reward of the other responses. One backward pass over some responses serves all latents. It tells causes from
companions: a latent that fires on rewarded text without writing any has none. Shapes: B responses, T positions, D channels,
F latents, N responses of all batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.beside import AnySae
from rlsae.interpretation.interventions.effects import Place
from rlsae.models import replace_output
from rlsae.tuning.fixed_prompts import FixedPrompts
from rlsae.tuning.rollout import Rollout, next_token_logp, taken

BATCH = 64


@dataclass(frozen=True)
class Rewarded:
    """Responses of a model to training prompts, and their rewards."""

    rollouts: list[Rollout]
    reward_N: NDArray[np.float64]

    @classmethod
    def by(cls, model: PreTrainedModel, prompts: FixedPrompts) -> Rewarded:
        rollouts = [rollout for _, rollout in prompts.responses(model)]
        rewards = [prompts.reward(rollout.prompts, rollout.responses) for rollout in rollouts]
        return cls(rollouts, np.concatenate(rewards))


def reward_gradients(
    place: Place, saes: Sequence[AnySae], rewarded: Rewarded
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The derivative of each latent [F] and its standard error [F], for each dictionary of a place.

    Args:
        rewarded: responses of the place's model, to other prompts than those on which a choice that rests on this is tested.
    """
    scores: list[list[Tensor]] = [[] for _ in saes]
    for rollout in rewarded.rollouts:
        for first in range(0, len(rollout), BATCH):
            acts_BTD, slope_BTD = _slope(place, rollout[first : first + BATCH])
            for sae, of_sae in zip(saes, scores, strict=True):
                latents_BTF = sae.encode(acts_BTD.flatten(0, 1)).view(*acts_BTD.shape[:2], -1)
                of_sae.append((latents_BTF * (slope_BTD @ sae.W_dec_FD.T)).sum(1).double().cpu())
    count = len(rewarded.reward_N)
    advantage_N = (rewarded.reward_N - rewarded.reward_N.mean()) * count / (count - 1)  # beside the mean of the others
    found = []
    for of_sae in scores:
        terms_NF = advantage_N[:, None] * torch.cat(of_sae).numpy()
        found.append((terms_NF.mean(0), terms_NF.std(0, ddof=1) / np.sqrt(count)))
    return found


def _slope(place: Place, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Rows of the place in some responses, and ∂ log p(response)/∂ rows, both [B, T, D]; zeros at padding."""
    kept: list[Tensor] = []

    def keep(acts_BTD: Tensor) -> Tensor:
        kept.append(acts_BTD.detach().requires_grad_())
        return kept[0]

    with torch.enable_grad(), replace_output(place.model, place.layer, place.hook, keep):
        logp_B = taken(next_token_logp(place.model, rollout), rollout).sum(1)
        (slope_BTD,) = torch.autograd.grad(logp_B.sum(), kept)
    return kept[0].detach(), slope_BTD
