"""How often a tuned model prefers what people preferred, on held-out pairs, beside a rule that only looks at length.

The implicit reward of a response is log π(response | prompt) - log π₀(response | prompt) (Rafailov et al. 2023,
arXiv 2305.18290, equation 5, up to the factor β); a pair counts as right where the chosen response has the larger one,
half where they are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.preferences import shared_start
from rlsae.statistics import bootstrap_ci95

BATCH = 32


def preference_accuracy(
    tuned: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, limit: int
) -> dict[str, Any]:
    """Accuracies in [0, 1] on the held-out pairs, each with a bootstrap confidence interval over pairs.

    `preference_accuracy` of the implicit reward; `length_only_accuracy` of the rule "the longer (or the shorter) response
    is preferred", whichever holds more often on the training pairs; `preference_pairs` whose prompt is shorter than `limit`
    tokens, where both responses are cut.
    """
    train, held_out = (encoded(pairs[pairs.held_out == side], tokenizer, limit) for side in (False, True))
    if not held_out:
        return {"preference_pairs": 0}
    margins = [implicit_reward(tuned, base, tokenizer, [pair[side] for pair in held_out]) for side in (0, 1)]
    right = half_for_ties(margins[0] - margins[1])
    longer_is_better = half_for_ties(length_differences(train)).mean() >= 0.5 if train else True
    by_length = half_for_ties(length_differences(held_out) * (1 if longer_is_better else -1))
    return {
        "preference_pairs": len(held_out),
        "preference_accuracy": float(right.mean()),
        "preference_accuracy_ci95": bootstrap_ci95(right),
        "length_only_accuracy": float(by_length.mean()),
        "length_only_accuracy_ci95": bootstrap_ci95(by_length),
    }


Encoded = tuple[list[int], int]
"""Token ids of prompt and response, and the number of those that belong to the prompt."""


def encoded(pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[Encoded, Encoded]]:
    """Chosen and rejected of each pair whose prompt leaves room, ended by the end-of-text token, cut at `limit`.

    A response begins where the token ids part from those of the prompt alone.
    """
    found = []
    for prompt_text, chosen_text, rejected_text in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True):
        prompt, chosen, rejected = (tokenizer(prompt_text + text)["input_ids"] for text in ("", chosen_text, rejected_text))
        start = shared_start(prompt, chosen, rejected)
        if start < limit:
            end = [tokenizer.eos_token_id]
            found.append((((chosen + end)[:limit], start), ((rejected + end)[:limit], start)))
    return found


@torch.no_grad()
def implicit_reward(
    tuned: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[Encoded]
) -> np.ndarray:
    """Σ log π - log π₀ of the response tokens of each text."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))  # little padding
    rewards = np.empty(len(texts))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = [texts[i] for i in rows]
        rewards[rows] = (response_logp(tuned, batch) - response_logp(base, batch)).double().cpu().numpy()
    return rewards


def response_logp(lm: PreTrainedModel, batch: list[Encoded]) -> Tensor:
    """log p(response | prompt) of each text [B]; padding stands on the right, where causal attention never looks."""
    longest, first = max(len(ids) for ids, _ in batch), min(start for _, start in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    response_BT = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (ids, start) in enumerate(batch):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        response_BT[row, max(start, 1) : len(ids)] = True
    ids_BT, response_BT = ids_BT.to(lm.device), response_BT.to(lm.device)
    kept = longest - max(first, 1)
    logits_BRV = lm(input_ids=ids_BT, logits_to_keep=kept + 1, use_cache=False).logits[:, :-1].float()
    logp_BR = -torch.nn.functional.cross_entropy(logits_BRV.transpose(1, 2), ids_BT[:, -kept:], reduction="none")
    return (logp_BR * response_BT[:, -kept:]).sum(1)


def length_differences(pairs: list[tuple[Encoded, Encoded]]) -> np.ndarray:
    """Tokens that the chosen response is longer than the rejected one."""
    return np.array([len(chosen[0]) - len(rejected[0]) for chosen, rejected in pairs])


def half_for_ties(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, ½ where zero."""
    return (np.sign(differences) + 1) / 2
