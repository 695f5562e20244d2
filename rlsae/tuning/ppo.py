"""Proximal policy optimisation of a causal language model on a text reward.

    maximise  E[ min(ρ A, clip(ρ, 1 ± ε) A) ] - c_v E[ max((V - R)², (clip(V, V_old ± ε_v) - R)²) ] / 2        (1)
    ρ = π(token) / π_old(token)
    A from rewards  r_t = -β (log π_old - log π_base)_t  + R(response) at the last token,
    by generalised advantage estimation:  A_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ V_{t+1} - V_t               (2)

(1) Schulman et al. 2017, arXiv 1707.06347; (2) Schulman et al. 2015, arXiv 1506.02438; the KL penalty and its adaptive
coefficient β: Ziegler et al. 2019, arXiv 1909.08593. One value head on the policy's own trunk.
Shapes are those of `rollout.py`. Every random draw is seeded by (seed, batch), so resuming needs no generator state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.config import PPOTuning
from rlsae.resumable import Stage
from rlsae.rewards import Reward
from rlsae.training import joint_seed, load_optimizer, optimizer_tensors, set_learning_rate, warmup_linear
from rlsae.tuning.history import History
from rlsae.tuning.policy import autocast, keep_checkpoint, lora_config, merged
from rlsae.tuning.rollout import PolicyWithValue, Prompts, Rollout, generate, next_token_logp, taken


def tune(
    lm: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Path,
    reward: Reward,
    entry: PPOTuning,
    stage: Stage,
) -> tuple[PreTrainedModel, pd.DataFrame]:
    """Tune `lm`, in place where it has no adapters; publish checkpoints under `stage.work`.

    Returns:
        The tuned model, and one row per rollout batch: reward, kl (nats per response), kl_coefficient, entropy (nats per
        token), policy_loss, value_loss, clip_fraction, response_length (tokens), learning_rate.
    """
    prompts = Prompts(corpus, tokenizer, base, entry, held_out=False)
    if (adapters := lora_config(entry)) is not None:
        torch.manual_seed(joint_seed(entry.seed, 1))
        lm = get_peft_model(lm, adapters)
    policy = PolicyWithValue(lm)
    policy.value_head.to(lm.device)
    groups = [
        {"params": [p for p in lm.parameters() if p.requires_grad], "peak_lr": entry.learning_rate},
        {"params": list(policy.value_head.parameters()), "peak_lr": entry.value_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=entry.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows: list[dict[str, float]] = []
    kl_coefficient = entry.kl_coefficient
    if (state := stage.load_state()) is not None:
        tensors, values = state
        for name, parameter in trained(policy).items():
            parameter.data.copy_(tensors[f"policy.{name}"])
        load_optimizer(optimizer, tensors)
        rows, kl_coefficient = values["history"], values["kl_coefficient"]

    history = History(stage, entry, rows)
    for batch in range(len(rows), entry.batches):
        rng = np.random.default_rng([entry.seed, batch])
        limits = rng.integers(entry.response_tokens[0], entry.response_tokens[1] + 1, entry.batch_size)
        with autocast(entry, lm.device):
            rollout = generate(lm, tokenizer, prompts.sample(entry.batch_size, rng), limits, int(rng.integers(2**31)))
            logp_BR, base_logp_BR, values_BR = score(policy, base, rollout, entry.rows_at_once)
        scores_B = torch.tensor(reward(rollout.prompts, rollout.responses), device=lm.device)
        kl_BR = logp_BR - base_logp_BR
        rewards_BR = token_rewards(scores_B, kl_BR, rollout, kl_coefficient)
        if entry.whiten_rewards:
            rewards_BR = whiten(rewards_BR, rollout.response_mask_BR, keep_mean=True)
        advantages_BR, returns_BR = advantages(
            rewards_BR, values_BR, rollout.response_mask_BR, entry.discount, entry.gae_lambda
        )

        factor = warmup_linear(batch, entry.warmup_batches, entry.batches)
        set_learning_rate(optimizer, factor)
        steps = []
        for _ in range(entry.epochs):
            order = torch.from_numpy(rng.permutation(entry.batch_size)).to(lm.device)
            for minibatch in order.split(entry.minibatch_size):
                tokens = rollout.lengths_B[minibatch].sum()
                for part in minibatch.split(entry.rows_at_once):
                    with autocast(entry, lm.device):
                        loss, figures = ppo_loss(
                            policy,
                            rollout[part],
                            logp_BR[part],
                            values_BR[part],
                            advantages_BR[part],
                            returns_BR[part],
                            tokens,
                            entry,
                        )
                    loss.backward()
                    steps.append(figures)
                torch.nn.utils.clip_grad_norm_(policy.parameters(), entry.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        kl = kl_BR.sum(1).mean().item()
        updates = len(steps) / entry.gradient_accumulation
        sums = torch.stack([torch.stack(list(figures.values())) for figures in steps]).sum(0).tolist()
        history.add(
            {
                "reward": scores_B.mean().item(),
                "kl": kl,
                "kl_coefficient": kl_coefficient,
                "response_length": rollout.lengths_B.float().mean().item(),
                "learning_rate": entry.learning_rate * factor,
                **{name: total / updates for name, total in zip(steps[0], sums, strict=True)},
            }
        )
        kl_coefficient = adapt(kl_coefficient, kl, entry)
        if batch + 1 in entry.checkpoint_steps():
            keep_checkpoint(stage, merged(lm), tokenizer, batch + 1)
        if stage.due():
            weights = {f"policy.{name}": parameter.data for name, parameter in trained(policy).items()}
            values = {"history": history.rows, "kl_coefficient": kl_coefficient}
            stage.save_state(weights | optimizer_tensors(optimizer), values)
    return merged(lm), history.table()


def trained(policy: PolicyWithValue) -> dict[str, torch.nn.Parameter]:
    """The parameters that the tuning changes."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def score(policy: PolicyWithValue, base: PreTrainedModel, rollout: Rollout, at_once: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the sampled tokens under policy and base, and values, each [B, R], `at_once` rows at a time."""
    parts = []
    for start in range(0, len(rollout), at_once):
        part = rollout[start : start + at_once]
        logp_BRV, values_BR = policy(part)
        parts.append((taken(logp_BRV, part), taken(next_token_logp(base, part), part), values_BR * part.response_mask_BR))
    logp_BR, base_logp_BR, values_BR = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logp_BR, base_logp_BR, values_BR


def token_rewards(scores_B: Tensor, kl_BR: Tensor, rollout: Rollout, kl_coefficient: float) -> Tensor:
    """-β times the KL estimate at each token, and the response's reward at its last token."""
    rewards_BR = -kl_coefficient * kl_BR
    last_B1 = rollout.lengths_B[:, None] - 1
    return rewards_BR.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BR.dtype))


def advantages(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Equation (2): whitened advantages and returns, both 0 behind the end of a response."""
    result_BR = torch.zeros_like(rewards_BR)
    running_B = torch.zeros_like(rewards_BR[:, 0])
    next_value_B = torch.zeros_like(running_B)
    for t in reversed(range(rewards_BR.shape[1])):
        delta_B = rewards_BR[:, t] + discount * next_value_B - values_BR[:, t]
        running_B = (delta_B + discount * gae_lambda * running_B) * mask_BR[:, t]
        next_value_B = values_BR[:, t] * mask_BR[:, t]
        result_BR[:, t] = running_B
    returns_BR = result_BR + values_BR
    return whiten(result_BR, mask_BR), returns_BR


def whiten(values_BR: Tensor, mask_BR: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale the values at response tokens to unit variance, around their mean or around zero; 0 elsewhere."""
    kept = values_BR[mask_BR]
    mean = kept.mean()
    whitened_BR = (values_BR - mean) / (kept.std(correction=min(1, len(kept) - 1)) + 1e-8)
    return (whitened_BR + mean if keep_mean else whitened_BR) * mask_BR


def ppo_loss(
    policy: PolicyWithValue,
    rollout: Rollout,
    old_logp_BR: Tensor,
    old_values_BR: Tensor,
    advantages_BR: Tensor,
    returns_BR: Tensor,
    tokens: Tensor,
    entry: PPOTuning,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation (1), negated: sums over response tokens, divided by the `tokens` of the whole minibatch."""

    def mean(values_BR: Tensor) -> Tensor:
        return values_BR[mask_BR].sum() / tokens

    mask_BR = rollout.response_mask_BR
    logp_BRV, values_BR = policy(rollout)
    ratio_BR = (taken(logp_BRV, rollout) - old_logp_BR).exp()
    clipped_BR = ratio_BR.clamp(1 - entry.clip, 1 + entry.clip)
    policy_loss = mean(-torch.min(ratio_BR * advantages_BR, clipped_BR * advantages_BR))
    near_BR = old_values_BR + (values_BR - old_values_BR).clamp(-entry.value_clip, entry.value_clip)
    value_loss = mean(0.5 * torch.max((values_BR - returns_BR) ** 2, (near_BR - returns_BR) ** 2))
    with torch.no_grad():
        figures = {
            "entropy": mean(-(logp_BRV.exp() * logp_BRV).sum(-1)),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": mean((ratio_BR != clipped_BR).float()),
        }
    return policy_loss + entry.value_coefficient * value_loss, figures


def adapt(kl_coefficient: float, kl: float, entry: PPOTuning) -> float:
    """Ziegler et al. 2019, equation 4: raise β where the KL exceeds its target, lower it where it falls short."""
    if entry.kl_target is None:
        return kl_coefficient
    error = float(np.clip(kl / entry.kl_target - 1, -0.2, 0.2))
    return kl_coefficient * (1 + error * entry.batch_size / entry.kl_horizon)
