"""Responses of both models to the same prompts, with what each word adds to the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from rlsae.report.content import records
from rlsae.report.formatting import tenths


@dataclass(frozen=True)
class Word:
    """A word of a response, and the space before it."""

    space: str
    text: str
    reward: float
    heat: int
    """Size of its reward as tenths of the largest of a word among the samples, from 0 to 9."""


@dataclass(frozen=True)
class Sample:
    """One prompt."""

    prompt: str
    responses: dict[str, list[Word]]
    """By role."""
    rewards: dict[str, float]


def samples(table: pd.DataFrame) -> list[Sample]:
    """The rows of `samples.parquet`; responses whose words were not scored are one word without a reward."""
    scored = [rewards for role in ("base", "tuned") for rewards in table[f"word_rewards_{role}"] if rewards is not None]
    largest = max((abs(reward) for rewards in scored for reward in rewards), default=0.0) or 1.0
    return [
        Sample(
            row["prompt"],
            {role: _words(row, role, largest) for role in ("base", "tuned")},
            {role: row[f"reward_{role}"] for role in ("base", "tuned")},
        )
        for row in records(table)
    ]


def _words(row: dict[str, Any], role: str, largest: float) -> list[Word]:
    words, rewards = row[f"words_{role}"], row[f"word_rewards_{role}"]
    if words is None:
        return [Word("", row[f"response_{role}"], 0.0, 0)]
    return [
        Word(text[: -len(word) or None], word, float(reward), tenths(abs(reward) / largest))
        for text, reward in zip(words, rewards, strict=True)
        for word in [text.lstrip()]
    ]
