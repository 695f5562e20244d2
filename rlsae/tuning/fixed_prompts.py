"""Prompts of a tuning, answered by any model with the same noise and judged by the tuning's reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from rlsae.artifacts import Manifest
from rlsae.config import AnyReward, Tuning
from rlsae.rewards import Reward, load_reward
from rlsae.training import joint_seed
from rlsae.tuning.rollout import Prompts, Rollout, generate

RESPONSES = 256
"""Responses sampled at once."""


class SharedNoise(LogitsProcessor):
    """Greedy decoding of logits plus Gumbel noise samples from their softmax; copies of a prompt meet the same noise.

    Responses of two models then part only where the models differ enough, and a difference of rewards is less uncertain than
    with noise of their own (the Gumbel-max coupling; Oberst and Sontag, arXiv 1905.05824).
    """

    def __init__(self, seeds: Sequence[int], copies: int) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.copies = copies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_NV = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self.generators])
        gumbel_NV = -(-uniform_NV.clamp_min(torch.finfo(torch.float32).tiny).log()).log()
        return scores + gumbel_NV.to(scores.device).repeat(self.copies, 1)


@dataclass(frozen=True)
class FixedPrompts:
    """Prompts and the longest responses to them, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    queries: list[list[int]]
    limits: NDArray[np.int64]
    reward: Reward
    seed: int

    @classmethod
    def draw(
        cls,
        corpus: Path,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        entry: Tuning,
        reward: Reward,
        count: int,
        held_out: bool = True,
    ) -> Self:
        """At most `count` distinct prompts, of held-out or of training documents."""
        prompts = Prompts(corpus, tokenizer, model, entry, held_out)
        rng = np.random.default_rng([entry.seed, 2**31 + 1])
        queries = prompts.sample(min(count, len(prompts.ids)), rng, distinct=True)
        limits = rng.integers(entry.response_tokens[0], entry.response_tokens[1] + 1, len(queries))
        return cls(tokenizer, queries, limits, reward, entry.seed)

    def responses(self, model: PreTrainedModel, copies: int = 1) -> Iterator[tuple[slice, Rollout]]:
        """Responses of the model to some of the prompts at a time, and which these are.

        Args:
            copies: rows per prompt, which meet the same noise: all prompts for the first copy, then all for the second, ....
        """
        together = max(1, RESPONSES // copies)
        for first in range(0, len(self.queries), together):
            prompts = slice(first, min(first + together, len(self.queries)))
            seeds = [joint_seed(self.seed, number) for number in range(prompts.start, prompts.stop)]
            queries, limits = self.queries[prompts] * copies, np.tile(self.limits[prompts], copies)
            yield prompts, generate(model, self.tokenizer, queries, limits, noise=SharedNoise(seeds, copies))

    def rewards(self, model: PreTrainedModel) -> NDArray[np.float64]:
        """Reward of one response of the model to each prompt [N]; equal models give equal responses."""
        return self.answers(model).reward.to_numpy()

    def answers(self, model: PreTrainedModel) -> pd.DataFrame:
        """`prompt`, `response` and `reward` of these responses, a row per prompt."""
        rows: list[tuple[str, str, float]] = []
        for _, rollout in self.responses(model):
            scores = self.reward(rollout.prompts, rollout.responses)
            rows += zip(rollout.prompts, rollout.responses, scores, strict=True)
        return pd.DataFrame(rows, columns=["prompt", "response", "reward"])


def judged_by(tuned: Path, reward_file: Path | None) -> tuple[Tuning, Reward]:
    """What a published policy was tuned with, as far as its evaluation needs it, and its reward.

    Args:
        tuned: artifact of the policy; reward_file: file or folder of its reward, where it has one.
    """
    recipe = Manifest.read(tuned).parameters
    entry = Tuning(**{key: recipe["tuning"][key] for key in Tuning.model_fields})
    path = {"path": str(reward_file)} if reward_file else {}
    return entry, load_reward(TypeAdapter(AnyReward).validate_python(recipe["reward"] | path), reward_file)
