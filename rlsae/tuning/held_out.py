"""Held-out prompts of a tuning, answered by any model from the same seeds and judged by the tuning's reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.artifacts import Manifest
from rlsae.config import AnyReward, Tuning
from rlsae.rewards import Reward, load_reward
from rlsae.training import joint_seed
from rlsae.tuning.rollout import Prompts, generate

RESPONSES = 64
"""Responses sampled at once."""


@dataclass(frozen=True)
class HeldOutPrompts:
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
    ) -> Self:
        """At most `count` distinct prompts."""
        prompts = Prompts(corpus, tokenizer, model, entry, held_out=True)
        rng = np.random.default_rng([entry.seed, 2**31 + 1])
        queries = prompts.sample(min(count, len(prompts.ids)), rng, distinct=True)
        limits = rng.integers(entry.response_tokens[0], entry.response_tokens[1] + 1, len(queries))
        return cls(tokenizer, queries, limits, reward, entry.seed)

    def rewards(self, model: PreTrainedModel) -> NDArray[np.float64]:
        """Reward of one response of the model to each prompt [N]; equal models give equal responses."""
        found: list[float] = []
        for first in range(0, len(self.queries), RESPONSES):
            rows = slice(first, first + RESPONSES)
            rollout = generate(model, self.tokenizer, self.queries[rows], self.limits[rows], joint_seed(self.seed, first))
            found += self.reward(rollout.prompts, rollout.responses)
        return np.array(found)


def judged_by(tuned: Path, reward_file: Path | None) -> tuple[Tuning, Reward]:
    """What a published policy was tuned with, as far as its evaluation needs it, and its reward.

    Args:
        tuned: artifact of the policy; reward_file: file or folder of its reward, where it has one.
    """
    recipe = Manifest.read(tuned).parameters
    entry = Tuning(**{key: recipe["tuning"][key] for key in Tuning.model_fields})
    path = {"path": str(reward_file)} if reward_file else {}
    return entry, load_reward(TypeAdapter(AnyReward).validate_python(recipe["reward"] | path), reward_file)
