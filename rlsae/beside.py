"""A second model that runs beside a first one on the same tokens: what a dictionary of both models' rows needs of them alive.

Shapes: B texts, T positions, N = B T rows, D channels, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlsae.activations.joint import join
from rlsae.models import Hook, replace_output
from rlsae.sae.dictionary import SparseAutoencoder


@dataclass
class OtherRows:
    """What the second model's module put out at the tokens that the first one is reading."""

    acts_BTD: Tensor = field(default_factory=lambda: torch.empty(0))

    def keep(self, acts_BTD: Tensor) -> Tensor:
        self.acts_BTD = acts_BTD.detach()
        return acts_BTD


@contextmanager
def beside(model: PreTrainedModel, other: PreTrainedModel, layer: int, hook: Hook) -> Iterator[OtherRows]:
    """Within the context every forward pass of `model` is preceded by one of `other` on the same input.

    Each keeps its own cache of keys and values, so that text may be generated.
    """
    rows = OtherRows()
    caches: dict[int, DynamicCache] = {}

    def before(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        if cache is not None:
            if cache.get_seq_length() == 0:
                caches.clear()
                caches[id(cache)] = DynamicCache(config=other.config)
            keywords = keywords | {"past_key_values": caches[id(cache)]}
        with torch.no_grad():
            other(*arguments, **keywords)

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with replace_output(other, layer, hook, rows.keep):
            yield rows
    finally:
        handle.remove()


@dataclass(frozen=True)
class SeenFrom:
    """A dictionary of the tuned model's or of both models' rows, at either model: the other's rows come from beside."""

    sae: SparseAutoencoder
    role: str
    """base or tuned: the model that runs."""
    other: OtherRows

    @property
    def latents(self) -> int:
        return self.sae.latents

    @property
    def W_dec_FD(self) -> Tensor:
        """What each latent writes in the model that runs, or of the difference between both."""
        return self.sae.parts()[self.role]

    def encode(self, acts_ND: Tensor) -> Tensor:
        """Latents [N, F] of rows of the model that runs."""
        other_ND = self.other.acts_BTD.flatten(0, 1)
        base_ND, tuned_ND = (acts_ND, other_ND) if self.role == "base" else (other_ND, acts_ND)
        return self.sae.encode(tuned_ND if self.sae.reads == "own" else join(self.sae.reads, base_ND, tuned_ND))


AnySae = SparseAutoencoder | SeenFrom


@contextmanager
def at_model(
    sae: SparseAutoencoder, of: str, role: str, models: dict[str, PreTrainedModel], layer: int, hook: Hook
) -> Iterator[AnySae]:
    """A dictionary for use at the model of a role, beside which the other one runs where the dictionary needs its rows.

    Args:
        of: role whose rows the dictionary reads where it reads one model's; at the other model, it is that of tuned.
        models: base and tuned, by role.
    """
    if sae.reads == "own" and of == role:
        yield sae
        return
    other = "tuned" if role == "base" else "base"
    with beside(models[role], models[other], layer, hook) as rows:
        yield SeenFrom(sae, role, rows)
