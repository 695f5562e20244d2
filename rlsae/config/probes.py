"""Probes: which linear functions of the latents predict the reward of a word."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsae.config.entry import Entry, OptionalPath, Positive, Seed


class Probes(Entry):
    triples: Positive = Field(
        400,
        description="At most so many contrastive triples (one context, a good, a bad and a neutral word), or held-out pairs.",
    )
    split_targets: Literal["average", "drop"] = Field(
        "average", description="A word of several tokens: average the activations at them, or leave its triple out."
    )
    path: OptionalPath = Field(
        None,
        description="Triples of your own, one JSON object with context, positive, negative and neutral per line (.jsonl or "
        ".jsonl.gz); null: they are built from held-out documents and the lexicon of the reward.",
    )
    seed: Seed = Field(0, description="Seed of contexts and words, folds, resamples and permutations.")
