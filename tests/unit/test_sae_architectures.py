"""Architectures: how they start, what they export, and that an exported dictionary does what training did."""

from __future__ import annotations

import typing

import pytest
import torch
from small_dictionaries import ENTRIES, entry_of, member_of, random_rows
from torch.nn.functional import normalize

from rlsae.config import ExternalDictionary
from rlsae.config.dictionaries import AnyDictionary
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.train import _adam

CHANNELS, LATENTS = 8, 24
UNIT = [name for name in ENTRIES if name != "relu"]


def trained(architecture, steps=20, seed=0, **changes):
    """A member after some steps on random rows."""
    member = member_of(architecture, CHANNELS, LATENTS, seed, **changes)
    optimizer = _adam(member.parameters(), 0.01)
    with torch.no_grad():
        for step in range(steps):
            member.backward(random_rows(64, CHANNELS, step))
            optimizer.step()
            member.constrain()
    return member


def decoder(member):
    return member.export().W_dec_FD


def test_every_architecture_of_the_configuration_is_found_by_its_name():
    union = typing.get_args(typing.get_args(AnyDictionary)[0])
    names = {
        typing.get_args(kind.model_fields["architecture"].annotation)[0] for kind in union if kind is not ExternalDictionary
    }
    assert names == set(ARCHITECTURES) == set(ENTRIES)


@pytest.mark.parametrize("architecture", ENTRIES)
@pytest.mark.parametrize(("seed", "latents"), [(1, 32), (0, 64)], ids=["another seed", "another width"])
def test_dictionaries_of_different_seeds_or_widths_do_not_share_their_start(architecture, seed, latents):
    one, other = member_of(architecture, 32, 32), member_of(architecture, 32, latents, seed)
    assert (decoder(one) @ decoder(other).T).max() < 0.9


@pytest.mark.parametrize("architecture", ENTRIES)
def test_dictionaries_of_one_seed_and_width_start_equal(architecture):
    one, other = (member_of(architecture, 32, 48, seed=3, learning_rate=rate) for rate in (0.1, 0.2))
    for mine, theirs in zip(one.parameters().values(), other.parameters().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("architecture", ENTRIES)
def test_the_encoder_starts_as_the_transpose_of_unit_directions(architecture):
    sae = member_of(architecture, CHANNELS, LATENTS).export()
    torch.testing.assert_close(sae.W_enc_DF, sae.W_dec_FD.T)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(LATENTS))


@pytest.mark.parametrize("architecture", UNIT)
def test_directions_have_unit_length_after_every_step(architecture):
    torch.testing.assert_close(decoder(trained(architecture)).norm(dim=1), torch.ones(LATENTS))


@pytest.mark.parametrize("architecture", ENTRIES)
def test_training_lowers_the_error(architecture):
    rows_BD = random_rows(64, CHANNELS)
    fresh, done = member_of(architecture, CHANNELS, LATENTS), trained(architecture, steps=200)
    with torch.no_grad():
        assert done.backward(rows_BD)["mse"] < 0.8 * fresh.backward(rows_BD)["mse"]


@pytest.mark.parametrize("architecture", [name for name in ENTRIES if name not in ("batchtopk", "matryoshka")])
def test_the_exported_dictionary_has_the_error_and_the_sparsity_that_training_saw(architecture):
    member, rows_BD = trained(architecture), random_rows(64, CHANNELS, seed=99)
    sae = member.export()
    latents_BF = sae.encode(rows_BD)
    error = (sae.decode(latents_BF) - rows_BD).square().mean()
    with torch.no_grad():
        figures = member.backward(rows_BD)
    channels = CHANNELS if member.unit_length else 1
    assert figures["mse"].item() == pytest.approx(channels * error.item(), rel=1e-5)
    assert figures["l0"].item() == pytest.approx(torch.count_nonzero(latents_BF).item() / 64)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_a_batchtopk_is_exported_with_the_threshold_that_keeps_k_on_average(architecture):
    member = trained(architecture, steps=300)
    latents_BF = member.export().encode(random_rows(4096, CHANNELS, seed=99))
    assert torch.count_nonzero(latents_BF).item() / 4096 == pytest.approx(member.k, rel=0.1)


@pytest.mark.parametrize("architecture", ENTRIES)
def test_an_exported_dictionary_does_with_raw_rows_what_training_did_with_centred_and_scaled_ones(architecture):
    sae, rows_BD = trained(architecture).export(), random_rows(64, CHANNELS, seed=99)
    mean_D, scale = torch.linspace(-3, 5, CHANNELS), 0.07
    raw, raw_BD = sae.reading_raw_rows(mean_D, scale), rows_BD / scale + mean_D
    latents_BF = sae.encode(rows_BD)
    torch.testing.assert_close(raw.encode(raw_BD), latents_BF, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.decode(latents_BF), sae.decode(latents_BF) / scale + mean_D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.directions(), sae.directions())


@pytest.mark.parametrize("architecture", ENTRIES)
def test_a_member_that_goes_on_from_an_exported_dictionary_exports_the_same_one(architecture):
    sae, mean_D, scale = trained(architecture).export(), torch.linspace(-3, 5, CHANNELS), 0.07
    other = member_of(architecture, CHANNELS, LATENTS, seed=7)
    with torch.no_grad():
        other.load(sae.reading_raw_rows(mean_D, scale).reading_normalised_rows(mean_D, scale))
    rows_BD = random_rows(64, CHANNELS, seed=99)
    torch.testing.assert_close(other.export().encode(rows_BD), sae.encode(rows_BD), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.export().W_dec_FD, sae.W_dec_FD)


# --- sparsity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["tied_relu", "relu", "gated"])
def test_a_stronger_l1_gives_fewer_active_latents(architecture):
    rows_BD = random_rows(256, CHANNELS, seed=99)
    active = [torch.count_nonzero(trained(architecture, 200, l1=l1).export().encode(rows_BD)) for l1 in (0.0, 0.05, 0.5)]
    assert active[0] > active[1] > active[2]


def test_a_jumprelu_comes_to_the_number_of_active_latents_that_it_aims_at():
    rows_BD = random_rows(2048, CHANNELS, seed=99)
    for wanted in (2, 4):
        latents_BF = trained("jumprelu", 1000, l0=wanted, l0_weight=4 * CHANNELS).export().encode(rows_BD)
        assert torch.count_nonzero(latents_BF).item() / 2048 == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_k_falls_from_the_channels_to_its_value_while_the_sparsity_warms_up(architecture):
    member, rows_BD = member_of(architecture, CHANNELS, 64, k=2), random_rows(64, CHANNELS)
    member.b_enc_F += 10  # so that every latent may fire
    assert [member.backward(rows_BD, strength)["l0"].item() for strength in (0.0, 0.5, 1.0)] == [CHANNELS, 5, 2]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_rows_since_a_latent_fired_are_counted(architecture):
    member = member_of(architecture, CHANNELS, LATENTS, k=2)
    member.b_enc_F[5] = 100
    member.b_enc_F[6] = -100
    for seed in range(3):
        member.backward(random_rows(64, CHANNELS, seed))
    assert member.silent_F[5] == 0
    assert member.silent_F[6] == 3 * 64


def test_auxk_revives_dead_latents():
    truth_GD = normalize(random_rows(32, 16, seed=5), dim=1)
    dead = {}
    for weight in (0.0, 1 / 32):
        member = member_of("topk", 16, 32, batch_rows=256, k=2, dead_rows=1024, auxk_weight=weight)
        member.b_enc_F[:24] = -3.0  # rarely active, never the largest
        optimizer = _adam(member.parameters(), 0.01)
        for step in range(400):
            generator = torch.Generator().manual_seed(step)
            active_BG = torch.rand(256, 32, generator=generator) < 2 / 32
            figures = member.backward(4 * (active_BG * (0.5 + torch.rand(256, 32, generator=generator))) @ truth_GD)
            optimizer.step()
            member.constrain()
        dead[weight] = figures["dead_share"].item()
    assert dead[1 / 32] < 0.5 * dead[0.0]


def test_early_latents_of_a_matryoshka_reconstruct_without_the_later_ones():
    rows_BD = random_rows(512, CHANNELS, seed=99) * torch.linspace(2, 0.2, CHANNELS)
    errors = {}
    for architecture in ("batchtopk", "matryoshka"):
        member = member_of(architecture, CHANNELS, LATENTS)
        optimizer = _adam(member.parameters(), 0.01)
        for step in range(300):
            member.backward(random_rows(64, CHANNELS, step) * torch.linspace(2, 0.2, CHANNELS))
            optimizer.step()
            member.constrain()
        sae = member.export()
        latents_BF = sae.encode(rows_BD)
        latents_BF[:, LATENTS // 4 :] = 0
        errors[architecture] = (sae.decode(latents_BF) - rows_BD).square().mean()
    assert errors["matryoshka"] < 0.8 * errors["batchtopk"]


def test_the_prefixes_of_a_matryoshka_rise_to_the_whole_dictionary():
    for prefixes in ([0.5], [1.0, 0.5], [0.5, 0.5, 1.0], []):
        with pytest.raises(ValueError, match="shares must rise and end with 1"):
            entry_of("matryoshka", prefixes=prefixes)
