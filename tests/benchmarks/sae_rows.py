"""Rows on which the quality of dictionaries is measured. Shapes: N rows, D channels, G planted directions."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.small_artifacts import dump, rows_of, tokens_of, write_policy, write_tokens

CONTEXT = 256
"""Tokens of a review that are read."""
NEEDED = "real rows need the folders of neox-imdb and of the reviews in RLSAE_MODELS and RLSAE_DATA"


@dataclasses.dataclass(frozen=True)
class Plant:
    """Rows made of known directions: each is active with a small probability, by an amplitude between 0.5 and 1.5."""

    channels: int
    directions: int
    active: int

    def truth(self, seed: int) -> torch.Tensor:
        """The unit vectors [G, D]."""
        generator = torch.Generator().manual_seed(seed)
        return normalize(torch.randn(self.directions, self.channels, generator=generator), dim=1)

    def rows(self, count: int, seed: int) -> torch.Tensor:
        """Rows [N, D], centred, with a mean variance of 1 per channel."""
        truth_GD, generator = self.truth(seed), torch.Generator().manual_seed(1000 + seed)
        rows_ND = torch.empty(count, self.channels)
        for first in range(0, count, 8192):
            size = (min(8192, count - first), self.directions)
            active_BG = torch.rand(size, generator=generator) < self.active / self.directions
            rows_ND[first : first + 8192] = (active_BG * (0.5 + torch.rand(size, generator=generator))) @ truth_GD
        return normalised(rows_ND)


PLANTED = Plant(channels=64, directions=256, active=3)


def model_rows(count: int, layer: int) -> torch.Tensor | None:
    """Outputs [N, D] of an MLP of neox-imdb, centred and scaled, in the order of the reviews it reads; None without it."""
    weights, reviews = (
        Path(os.environ.get(name, "")) / inside
        for name, inside in (("RLSAE_MODELS", "neox-imdb"), ("RLSAE_DATA", "imdb-test.jsonl.gz"))
    )
    if not (weights.exists() and reviews.exists()):
        return None
    tokenizer = AutoTokenizer.from_pretrained(weights)
    documents: list[list[int]] = []
    with gzip.open(reviews, "rt", encoding="utf-8") as lines:
        while sum(map(len, documents)) < count:
            documents.append(tokenizer(json.loads(next(lines))["text"])["input_ids"][:CONTEXT])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = write_policy(folder / "models/neox-imdb", AutoModelForCausalLM.from_pretrained(weights), tokenizer)
        tokens = write_tokens(folder / "tokens/neox-imdb.reviews", tokens_of(documents))
        dumped = dump(folder / "activations", policy, tokens, layers=[layer], rows=count, rows_per_part=count)
        return normalised(torch.from_numpy(rows_of(dumped, layer)).float())


def normalised(rows_ND: torch.Tensor) -> torch.Tensor:
    """Centred, with a mean variance of 1 per channel."""
    centred_ND = rows_ND - rows_ND.mean(0)
    return centred_ND / centred_ND.square().mean().sqrt()
