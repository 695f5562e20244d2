"""Gradients of the architectures, against autograd of the loss as the head of each file writes it."""

from __future__ import annotations

import pytest
import torch
from small_dictionaries import ENTRIES, member_of, random_rows
from torch.nn.functional import normalize

from rlsae.sae.jumprelu import Step

ROWS, CHANNELS, LATENTS = 32, 8, 24


def in_the_middle(architecture, **changes):
    """A member in the middle of its training: with biases, and an encoder that is not the decoder's transpose."""
    member = member_of(architecture, CHANNELS, LATENTS, batch_rows=ROWS, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in member.parameters().items():
            if not name.startswith("W_dec") and name != "W_FD":
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return member


def decoded(latents_BF, W_dec_FD, b_dec_D):
    return latents_BF @ W_dec_FD + b_dec_D


def tied_relu(member, acts_BD, W_FD, b_enc_F, b_dec_D):
    W_FD = normalize(W_FD, dim=1)
    latents_BF = torch.relu(acts_BD @ W_FD.T + b_enc_F)
    return (acts_BD - decoded(latents_BF, W_FD, b_dec_D)).square().mean() + member.l1 * latents_BF.sum(1).mean()


def relu(member, acts_BD, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D):
    latents_BF = torch.relu(acts_BD @ W_enc_FD.T + b_enc_F)
    penalty = (latents_BF * member.l1_F * W_dec_FD.norm(dim=1)).sum(1).mean()
    return (acts_BD - decoded(latents_BF, W_dec_FD, b_dec_D)).square().sum(1).mean() + penalty


def largest(latents_BF, k):
    return latents_BF * (latents_BF >= latents_BF.topk(k, dim=1).values[:, -1:])


def largest_of_batch(latents_BF, count):
    return latents_BF * (latents_BF >= latents_BF.flatten().topk(count).values[-1])


def auxk(member, acts_BD, residual_BD, dead_F, W_enc_FD, b_enc_F, W_dec_FD):
    """The auxk term of latents that are dead."""
    latents_BF = torch.relu(acts_BD @ W_enc_FD.T + b_enc_F) * dead_F
    rebuilt_BD = largest(latents_BF, CHANNELS // 2) @ W_dec_FD
    variance = (residual_BD - residual_BD.mean(0)).square().sum()
    return member.auxk_weight * (residual_BD - rebuilt_BD).square().sum() / variance


def topk(member, acts_BD, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, dead_F=None, select=largest, count=None):
    W_dec_FD = normalize(W_dec_FD, dim=1)
    latents_BF = select(torch.relu(acts_BD @ W_enc_FD.T + b_enc_F), count or member.k)
    residual_BD = acts_BD - decoded(latents_BF, W_dec_FD, b_dec_D)
    loss = residual_BD.square().mean()
    if dead_F is not None:
        loss = loss + auxk(member, acts_BD, residual_BD.detach(), dead_F, W_enc_FD, b_enc_F, W_dec_FD)
    return loss


def batchtopk(member, acts_BD, *parameters):
    return topk(member, acts_BD, *parameters, select=largest_of_batch, count=member.k * len(acts_BD))


def matryoshka(member, acts_BD, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D):
    W_dec_FD = normalize(W_dec_FD, dim=1)
    latents_BF = largest_of_batch(torch.relu(acts_BD @ W_enc_FD.T + b_enc_F), member.k * len(acts_BD))
    prefixes = [decoded(latents_BF[:, :end], W_dec_FD[:end], b_dec_D) for end in member.ends_M.tolist()]
    return torch.stack([(acts_BD - rebuilt_BD).square().mean() for rebuilt_BD in prefixes]).mean()


WRITTEN = {loss.__name__: loss for loss in (tied_relu, relu, topk, batchtopk, matryoshka)}


def assert_gradients(member, acts_BD, written, **options):
    leaves = [parameter.clone().requires_grad_() for parameter in member.parameters().values()]
    written(member, acts_BD, *leaves, **options).backward()
    for (name, found), leaf in zip(member.parameters().items(), leaves, strict=True):
        assert leaf.grad.abs().max() > 1e-4, name
        difference = (found.grad - leaf.grad).norm() / leaf.grad.norm()
        assert difference < 1e-5, (name, difference)


@pytest.mark.parametrize("architecture", WRITTEN)
def test_gradients_in_closed_form_are_those_of_the_written_loss(architecture):
    member = in_the_middle(architecture)
    for seed in (0, 1, 2):  # the later ones meet buffers in use, and a guess of the threshold
        acts_BD = random_rows(ROWS, CHANNELS, seed)
        member.backward(acts_BD)
        assert_gradients(member, acts_BD, WRITTEN[architecture])


@pytest.mark.parametrize("l1", [0.0, 2.0])
@pytest.mark.parametrize("architecture", ["tied_relu", "relu"])
def test_they_are_so_at_any_weight_of_the_sparsity(architecture, l1):
    member, acts_BD = in_the_middle(architecture, l1=l1), random_rows(ROWS, CHANNELS)
    member.backward(acts_BD)
    assert_gradients(member, acts_BD, WRITTEN[architecture])


@pytest.mark.parametrize("dead", [3, 15], ids=["few dead latents", "more than half the channels"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_auxk_trains_decoder_and_encoder_of_the_dead_latents_on_the_residual(architecture, dead):
    member, acts_BD = in_the_middle(architecture, k=1, auxk_weight=0.5), random_rows(ROWS, CHANNELS)
    dead_F = torch.zeros(LATENTS)
    dead_F[:dead] = 1
    with torch.no_grad():  # active, but never among the largest
        member.W_enc_FD[:dead] *= 1e-3
        member.b_enc_F[:dead] = 1e-3
        member.b_enc_F[dead:] += 3
    member.silent_F[:dead] = member.dead_rows
    member.backward(acts_BD)
    options = {} if architecture == "topk" else {"select": largest_of_batch, "count": member.k * ROWS}
    assert_gradients(member, acts_BD, topk, dead_F=dead_F, **options)
    for parameter in (member.W_enc_FD, member.W_dec_FD, member.b_enc_F):
        assert parameter.grad[:dead].abs().sum() > 0


def test_without_auxk_dead_latents_learn_nothing():
    member = in_the_middle("topk", k=1, auxk_weight=0.0)
    with torch.no_grad():
        member.b_enc_F[:3] = -10
    member.silent_F[:3] = member.dead_rows
    member.backward(random_rows(ROWS, CHANNELS))
    assert not member.W_enc_FD.grad[:3].any()


@pytest.mark.parametrize("architecture", ENTRIES)
def test_a_batch_leaves_no_trace_in_the_gradients_of_the_next(architecture):
    first, second = in_the_middle(architecture), in_the_middle(architecture)
    first.backward(random_rows(ROWS, CHANNELS, seed=1))
    for member in (first, second):
        member.backward(random_rows(ROWS, CHANNELS))
    for one, other in zip(first.parameters().values(), second.parameters().values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("architecture", [name for name in ENTRIES if name != "relu"])
def test_rows_of_unit_length_are_turned_and_not_lengthened(architecture):
    member = in_the_middle(architecture)
    member.backward(random_rows(ROWS, CHANNELS))
    W_FD = getattr(member, "W_dec_FD", getattr(member, "W_FD", None))
    torch.testing.assert_close((W_FD.grad * W_FD).sum(1), torch.zeros(LATENTS), atol=1e-6, rtol=0)


def test_a_step_passes_gradients_to_the_values_close_to_its_threshold_and_the_opposite_to_the_threshold():
    threshold_F = torch.tensor([1.0, 1.0], requires_grad=True)
    pre_BF = torch.tensor([[1.04, 0.9], [0.96, 1.2], [0.5, 1.0]], requires_grad=True)
    active_BF = Step.apply(pre_BF, threshold_F, 0.1)
    assert active_BF.tolist() == [[1, 0], [0, 1], [0, 0]]
    (active_BF * torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])).sum().backward()
    torch.testing.assert_close(threshold_F.grad, torch.tensor([-(1 + 2) / 0.1, -40 / 0.1]))
    torch.testing.assert_close(pre_BF.grad, torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 40.0]]) / 0.1)
