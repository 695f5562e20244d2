"""What a tuning gained and what it cost, on held-out prompts: base and tuned from the same prompts and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.config import Tuning
from rlsae.rewards import Reward, word_rewards
from rlsae.statistics import bootstrap_ci95
from rlsae.training import joint_seed
from rlsae.tuning.rollout import Prompts, Rollout, generate, next_token_logp, taken

BATCH = 32
SAMPLES = 64
"""Rows of the table of samples."""
BY_WORD = 20
"""The first of them tell what each word adds to the reward: each costs a reward per word."""
KL_HIGH = 1.0
"""Nats per token beyond which samples read as another language (fluent tunings stay at 0.3–0.6)."""
SUPPRESSED = 0.5
"""Share of the base's distinct bigrams, or of its rate of ended responses, below which they count as suppressed."""


def evaluate(
    tuned: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    reward: Reward,
    entry: Tuning,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Metrics of a tuning, and prompts with the responses of both models.

    The same for every method. `kl` is E[Σ_t KL(tuned ‖ base)_t] over the tuned model's own responses, each term exact
    over the vocabulary (nats per response); `perplexity_*` that of each model's responses under the base; `distinct_2_*`
    the share of distinct ones among all bigrams of words; `eos_rate_*` the share of responses that end by themselves.
    """
    rng = np.random.default_rng([entry.seed, 2**31])
    queries = prompts.sample(entry.evaluation_prompts, rng, distinct=True)
    limits = rng.integers(entry.response_tokens[0], entry.response_tokens[1] + 1, len(queries))
    columns: dict[str, Any] = {}
    metrics: dict[str, Any] = {"evaluation_prompts": len(queries)}
    for role, model in (("base", base), ("tuned", tuned)):
        rows = [_respond(model, base, tokenizer, queries, limits, start, entry.seed) for start in range(0, len(queries), BATCH)]
        texts = [text for r in rows for text in r["responses"]]
        columns["prompt"] = [text for r in rows for text in r["prompts"]]
        columns[f"response_{role}"] = texts
        columns[f"reward_{role}"] = np.array(reward(columns["prompt"], texts))
        by_word = [word_rewards(reward, *pair) for pair in zip(columns["prompt"][:BY_WORD], texts, strict=False)]
        for name, lists in zip(("words", "word_rewards"), zip(*by_word, strict=True), strict=True):
            columns[f"{name}_{role}"] = [*lists, *[None] * (len(texts) - len(lists))]
        lengths = torch.cat([r["lengths_B"] for r in rows]).double()
        negative_log = torch.cat([r["base_nll_B"] for r in rows]).double()
        metrics |= {
            f"reward_{role}": float(columns[f"reward_{role}"].mean()),
            f"response_length_{role}": lengths.mean().item(),
            f"eos_rate_{role}": torch.cat([r["ended_B"] for r in rows]).double().mean().item(),
            f"perplexity_{role}": (negative_log.sum() / lengths.sum()).exp().item(),
            f"distinct_2_{role}": distinct_bigrams(texts),
        }
        if role == "tuned":
            kl = torch.cat([r["kl_B"] for r in rows]).double()
            metrics |= {
                "kl": kl.mean().item(),
                "kl_ci95": bootstrap_ci95(kl.numpy()),
                "kl_per_token": (kl.sum() / lengths.sum()).item(),
            }
    gain = columns["reward_tuned"] - columns["reward_base"]
    metrics |= {"reward_gain": float(gain.mean()), "reward_gain_ci95": bootstrap_ci95(gain)}
    metrics |= {f"reward_{role}_ci95": bootstrap_ci95(columns[f"reward_{role}"]) for role in ("base", "tuned")}
    metrics["signs_of_reward_hacking"] = signs_of_reward_hacking(metrics)
    return metrics, pd.DataFrame(columns).head(SAMPLES)


def signs_of_reward_hacking(metrics: dict[str, Any]) -> list[str]:
    """Which of `kl_high`, `distinct_2_collapsed` and `eos_suppressed` hold: a reward gained that way means little."""

    def suppressed(key: str) -> bool:
        base, tuned = metrics[f"{key}_base"], metrics[f"{key}_tuned"]
        return base is not None and (tuned or 0.0) < SUPPRESSED * base

    signs = {
        "kl_high": metrics["kl_per_token"] > KL_HIGH,
        "distinct_2_collapsed": suppressed("distinct_2"),
        "eos_suppressed": suppressed("eos_rate"),
    }
    return [sign for sign, holds in signs.items() if holds]


@torch.no_grad()
def _respond(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[list[int]],
    limits: np.ndarray,
    start: int,
    seed: int,
) -> dict[str, Any]:
    """Responses to one batch of prompts and what is measured on them."""
    rows = slice(start, start + BATCH)
    rollout = generate(model, tokenizer, queries[rows], limits[rows], seed=joint_seed(seed, start))
    base_logp_BRV = next_token_logp(base, rollout)
    logp_BRV = next_token_logp(model, rollout)
    kl_BR = (logp_BRV.exp() * (logp_BRV - base_logp_BRV)).sum(-1) * rollout.response_mask_BR
    return {
        "prompts": rollout.prompts,
        "responses": rollout.responses,
        "lengths_B": rollout.lengths_B.cpu(),
        "base_nll_B": -taken(base_logp_BRV, rollout).sum(1).cpu(),
        "kl_B": kl_BR.sum(1).cpu(),
        "ended_B": ended(rollout, tokenizer.eos_token_id).cpu(),
    }


def ended(rollout: Rollout, eos_token_id: int) -> Tensor:
    """Whether each response [B] ends with the end-of-text token."""
    last_B = rollout.response_ids_BR.gather(1, rollout.lengths_B[:, None] - 1).squeeze(1)
    return last_B == eos_token_id


def distinct_bigrams(texts: list[str]) -> float | None:
    """Distinct bigrams of words over all bigrams (Li et al. 2016, arXiv 1510.03055); None without any."""
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None
