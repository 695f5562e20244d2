"""Small random models that differ in one place."""

from __future__ import annotations

import copy

import torch

from rlsae.models import blocks, component


def perturbed(model, layer, hook="mlp", scale=0.1, seed=1):
    """A copy of a model with noise on one part of one layer."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in component(blocks(changed)[layer], hook).parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return changed


def by_measure(found, component=None):
    """Values of each measure, of one component where several were measured."""
    return {m.measure: m.values_L.tolist() for m in found if component in (None, m.component)}
