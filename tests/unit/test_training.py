"""Learning-rate schedules and optimizer state."""

from __future__ import annotations

import copy

import pytest
import torch

from rlsae.training import (
    joint_seed,
    load_optimizer,
    optimizer_tensors,
    set_learning_rate,
    warmup_cosine,
    warmup_hold_decay,
    warmup_linear,
)


def factors(schedule, *settings):
    return [schedule(step, *settings) for step in range(settings[-1])]


def test_a_linear_schedule_rises_to_one_and_falls_straight_to_zero():
    assert factors(warmup_linear, 2, 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert warmup_linear(6, 2, 6) == 0.0


def test_a_cosine_schedule_rises_to_one_and_falls_as_half_a_cosine():
    assert factors(warmup_cosine, 2, 6) == pytest.approx([0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464], abs=1e-4)
    assert warmup_cosine(6, 2, 6) == pytest.approx(0.0)


def test_a_hold_schedule_rises_stays_and_falls():
    assert factors(warmup_hold_decay, 2, 4, 8) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("schedule", "settings"), [(warmup_linear, (0, 5)), (warmup_cosine, (0, 5)), (warmup_hold_decay, (0, 0, 5))]
)
def test_a_schedule_without_warm_up_starts_at_the_peak(schedule, settings):
    assert factors(schedule, *settings)[0] == 1.0


@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0, 1, 7, 9])
@pytest.mark.parametrize("schedule", [warmup_linear, warmup_cosine])
def test_every_step_of_a_schedule_has_a_rate_above_zero_and_up_to_the_peak(schedule, warmup, total):
    assert all(0 < factor <= 1 for factor in factors(schedule, warmup, total))


def test_each_group_has_its_own_peak():
    groups = [{"params": [torch.zeros(1)], "peak_lr": 0.1}, {"params": [torch.zeros(1)], "peak_lr": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=9.0)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.25]


def walk(parameters, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimizer_goes_on_bit_for_bit(parameters, fused):
    whole = copy.deepcopy(parameters)
    walk(whole, torch.optim.AdamW([{"params": whole[:1]}, {"params": whole[1:]}], fused=fused), range(7))

    first = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], fused=fused)
    walk(parameters, first, range(4))
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()}
    resumed = copy.deepcopy(parameters)
    second = torch.optim.AdamW([{"params": resumed[:1]}, {"params": resumed[1:]}], fused=fused)
    load_optimizer(second, state)
    walk(resumed, second, range(4, 7))

    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_an_optimizer_takes_only_the_tensors_of_its_own_prefix(parameters):
    first, second = torch.optim.AdamW(parameters[:1]), torch.optim.AdamW(parameters[1:])
    walk(parameters, first, range(2))
    walk(parameters, second, range(2))
    state = optimizer_tensors(first, "small") | optimizer_tensors(second, "big") | {"big_weight": torch.zeros(1)}
    restored = torch.optim.AdamW(parameters[1:])
    load_optimizer(restored, state, "big")
    moments = restored.state[parameters[1]]
    assert moments["exp_avg"].shape == parameters[1].shape
    assert torch.equal(moments["exp_avg"], second.state[parameters[1]]["exp_avg"])
    assert len(restored.state) == 1


def test_a_seed_made_of_several_numbers_depends_on_each_and_on_their_order():
    seeds = {joint_seed(*parts) for parts in [(0, 1), (1, 0), (0, 2), (0,), (0, 1, 1)]}
    assert len(seeds) == 5
    assert joint_seed(0, 1) == joint_seed(0, 1)
