"""Matrix products in bfloat16: what stays float32, and that a dictionary becomes as good."""

from __future__ import annotations

import pytest
import torch
from small_dictionaries import ENTRIES, member_of, random_rows
from torch.nn.functional import normalize

from rlsae.sae.train import _adam
from rlsae.training import set_learning_rate, warmup_hold_decay

CHANNELS, LATENTS, ROWS, DIRECTIONS = 32, 64, 256, 32


def rows_of_a_mixture(seed):
    """A few directions out of many in each row, and noise."""
    generator = torch.Generator().manual_seed(seed)
    directions_GD = normalize(random_rows(DIRECTIONS, CHANNELS, seed=5), dim=1)
    active_BG = torch.rand(ROWS, DIRECTIONS, generator=generator) < 2 / DIRECTIONS
    strength_BG = 2 + 2 * torch.rand(ROWS, DIRECTIONS, generator=generator)
    return (active_BG * strength_BG) @ directions_GD + 0.1 * torch.randn(ROWS, CHANNELS, generator=generator)


def trained(architecture, precision, steps=300, learning_rate=0.005):
    member = member_of(architecture, CHANNELS, LATENTS, batch_rows=ROWS, precision=precision)
    optimizer = _adam(member.parameters(), learning_rate)
    with torch.no_grad():
        for step in range(steps):
            set_learning_rate(optimizer, warmup_hold_decay(step, 1, steps // 3, steps))
            member.backward(rows_of_a_mixture(step))
            optimizer.step()
            member.constrain()
    return member


def fvu(member):
    sae, rows_BD = member.export(), rows_of_a_mixture(10_000)
    with torch.no_grad():
        error_BD = sae.decode(sae.encode(rows_BD.clone())) - rows_BD
    return (error_BD.square().sum() / (rows_BD - rows_BD.mean(0)).square().sum()).item()


@pytest.mark.parametrize("architecture", ENTRIES)
def test_a_dictionary_trained_in_bfloat16_explains_as_much_as_one_in_float32(architecture):
    exact, narrow = (fvu(trained(architecture, precision)) for precision in ("float32", "bfloat16"))
    assert exact < 0.3
    assert narrow == pytest.approx(exact, rel=0.03)
    assert narrow != exact


def after_a_batch(architecture, precision):
    """A member with the gradients of its first batch, and their figures."""
    member = member_of(architecture, CHANNELS, LATENTS, batch_rows=ROWS, precision=precision)
    with torch.no_grad():
        return member, member.backward(rows_of_a_mixture(0))


@pytest.mark.parametrize("architecture", ENTRIES)
def test_weights_gradients_and_figures_stay_in_float32(architecture):
    (_, exact), (member, figures) = (after_a_batch(architecture, precision) for precision in ("float32", "bfloat16"))
    for name, parameter in member.parameters().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    for name, figure in figures.items():
        assert figure.dtype == torch.float32, name
        assert figure.item() == pytest.approx(exact[name].item(), rel=0.01), name


@pytest.mark.parametrize("architecture", ["tied_relu", "relu"])
def test_gradients_in_bfloat16_are_close_to_the_exact_ones(architecture):
    (exact, _), (narrow, _) = (after_a_batch(architecture, precision) for precision in ("float32", "bfloat16"))
    for (name, one), other in zip(exact.parameters().items(), narrow.parameters().values(), strict=True):
        assert (other.grad - one.grad).norm() < 0.02 * one.grad.norm(), name
