"""What an edited model writes, and what that is worth: reward, distance from the unedited model, fluency.

All edits answer the same prompts with the same noise (rlsae/tuning/fixed_prompts.py), many in one batch. Shapes: E edits,
N prompts, B = E N responses, R response positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlsae.models import Hook, replace_output
from rlsae.tuning.evaluate import distinct_bigrams
from rlsae.tuning.fixed_prompts import RESPONSES, FixedPrompts
from rlsae.tuning.rollout import next_token_logp, taken

SCORED = 128
"""Responses whose log-probabilities over the whole vocabulary are held at once."""

Treatment = Callable[[Tensor], Tensor]
"""What becomes of a module's output acts_BTD, whose rows are equal blocks, one for each edit."""


@dataclass(frozen=True)
class Place:
    """A module of a running model."""

    model: PreTrainedModel
    layer: int
    hook: Hook


@dataclass(frozen=True)
class Effects:
    """What the responses under each edit are like."""

    reward_EN: NDArray[np.float64]
    kl_EN: NDArray[np.float64]
    """Σ_t KL(edited ‖ unedited), nats per response, each term exact over the vocabulary."""
    nll_EN: NDArray[np.float64]
    """Under the base model, summed over a response."""
    tokens_EN: NDArray[np.int64]
    texts: list[list[str]]
    """Of each edit, in the order of the prompts."""

    def perplexity(self, edit: int) -> float:
        """Of the responses, under the base model."""
        return float(np.exp(self.nll_EN[edit].sum() / self.tokens_EN[edit].sum()))

    def distinct_2(self, edit: int) -> float | None:
        return distinct_bigrams(self.texts[edit])


@torch.inference_mode()
def rewards(place: Place, treat: Callable[[slice], Treatment], edits: int, prompts: FixedPrompts) -> NDArray[np.float64]:
    """Reward of a response to each prompt under each edit [E, N].

    Args:
        treat: the treatment for some of the edits.
    """
    found_EN = np.empty((edits, len(prompts.queries)))
    together = max(1, RESPONSES // len(prompts.queries))
    for first in range(0, edits, together):
        some = slice(first, min(first + together, edits))
        with replace_output(place.model, place.layer, place.hook, treat(some)):
            for rows, rollout in prompts.responses(place.model, some.stop - some.start):
                scores = prompts.reward(rollout.prompts, rollout.responses)
                found_EN[some, rows] = np.reshape(scores, (some.stop - some.start, -1))
    return found_EN


@torch.inference_mode()
def effects(
    place: Place, treat: Callable[[slice], Treatment], edits: int, prompts: FixedPrompts, base: PreTrainedModel
) -> Effects:
    """The same with all that else is measured."""
    shape = edits, len(prompts.queries)
    found = Effects(np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, np.int64), [[] for _ in range(edits)])
    together = max(1, SCORED // len(prompts.queries))
    for first in range(0, edits, together):
        some = slice(first, min(first + together, edits))
        copies, treatment = some.stop - some.start, treat(some)
        with replace_output(place.model, place.layer, place.hook, treatment):
            answers = list(prompts.responses(place.model, copies))
        for rows, rollout in answers:
            with replace_output(place.model, place.layer, place.hook, treatment):
                edited_BRV = next_token_logp(place.model, rollout)
            plain_BRV = next_token_logp(place.model, rollout)
            base_BRV = plain_BRV if base is place.model else next_token_logp(base, rollout)
            kl_BR = (edited_BRV.exp() * (edited_BRV - plain_BRV)).sum(-1) * rollout.response_mask_BR
            found.reward_EN[some, rows] = np.reshape(prompts.reward(rollout.prompts, rollout.responses), (copies, -1))
            found.kl_EN[some, rows] = kl_BR.sum(1).view(copies, -1).cpu()
            found.nll_EN[some, rows] = -taken(base_BRV, rollout).sum(1).view(copies, -1).cpu()
            found.tokens_EN[some, rows] = rollout.lengths_B.view(copies, -1).cpu()
            for edit, texts in enumerate(np.array_split(rollout.responses, copies), first):
                found.texts[edit] += texts.tolist()
    return found


def of_blocks(treatments: Sequence[Treatment]) -> Callable[[slice], Treatment]:
    """Each treatment for an equal block of the rows."""

    def some(which: slice) -> Treatment:
        chosen = treatments[which]
        return lambda acts_BTD: torch.cat(
            [function(block) for function, block in zip(chosen, acts_BTD.chunk(len(chosen)), strict=True)]
        )

    return some
