"""The write-change test: regression on a code, its variance over documents, and the linear map that latents share.

Every statistic is compared with an independent slow computation; the test as a whole with what a null promises.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from small_artifacts import random_documents, tokens_of, write_store

from rlsae.activations.store import ActivationStore
from rlsae.comparison import paired_rows
from rlsae.comparison.code import SPARSE_DENSITY, CompressedCode, DenseCode, Gram, code_of, encode
from rlsae.comparison.linear_map import fit_linear_maps, shared_rank
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import benjamini_hochberg, kinds, minimum_effect, tag_pair
from rlsae.comparison.write_change import (
    MIN_FIRINGS,
    CodedBatch,
    WriteChange,
    cluster_variance,
    p_values,
    regress,
    write_changes,
)
from rlsae.errors import RlsaeError
from rlsae.sae.activation_functions import TopK
from rlsae.sae.dictionary import SparseAutoencoder

CPU = torch.device("cpu")
CHANNELS, LATENTS, GROUPS, GROUP_ROWS = 6, 5, 20, 40


def code_and_target(seed=0, rows=GROUPS * GROUP_ROWS, latents=LATENTS, columns=CHANNELS):
    """A correlated sparse code, whose last latent never fires, and a target that it explains in part."""
    rng = np.random.default_rng(seed)
    latents_NF = np.maximum(rng.normal(size=(rows, latents)) @ rng.normal(size=(latents, latents)), 0)
    latents_NF[:, -1] = 0
    target_NE = latents_NF @ rng.normal(size=(latents, columns)) + rng.normal(size=(rows, columns)) + 3
    return latents_NF.astype(np.float32), target_NE.astype(np.float32)


def in_groups(latents_NF, target_NE, groups=GROUPS):
    """Function of batches, two for each group."""
    parts = np.array_split(np.arange(len(latents_NF)), 2 * groups)

    def batches():
        for number, rows in enumerate(parts):
            yield CodedBatch(number // 2, code_of(torch.from_numpy(latents_NF[rows])), torch.from_numpy(target_NE[rows]))

    return batches


def slow_ridge(latents_NF, target_NE):
    """The writes by least squares with a row of penalty for each latent; latents that never fire are left out."""
    fires = latents_NF.std(0) > 0
    code_NF = latents_NF[:, fires].astype(np.float64)
    scale_F = code_NF.std(0)
    code_NF = (code_NF - code_NF.mean(0)) / scale_F
    penalty_FF = np.sqrt(0.1 * len(code_NF)) * np.eye(len(scale_F))
    target_NE = target_NE - target_NE.mean(0, dtype=np.float64)
    padded_NE = np.concatenate([target_NE, np.zeros((len(scale_F), target_NE.shape[1]))])
    writes_FE = np.zeros((len(fires), target_NE.shape[1]))
    writes_FE[fires] = np.linalg.lstsq(np.concatenate([code_NF, penalty_FF]), padded_NE)[0] / scale_F[:, None]
    return writes_FE


# --- regression on a code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_writes_are_those_of_a_ridge_regression(seed):
    latents_NF, target_NE = code_and_target(seed)
    fit = regress(in_groups(latents_NF, target_NE))
    np.testing.assert_allclose(fit.writes_FE, slow_ridge(latents_NF, target_NE), atol=1e-5)
    assert fit.firings_F.tolist() == (latents_NF > 0).sum(0).tolist()


def test_a_latent_that_never_fires_writes_nothing():
    fit = regress(in_groups(*code_and_target()))
    assert fit.firings_F[-1] == 0
    assert (fit.writes_FE[-1] == 0).all()


@pytest.mark.parametrize("density", [0.005, 0.5])
def test_products_are_the_same_through_the_active_latents_alone(density):
    rng = np.random.default_rng(0)
    latents_BF = torch.from_numpy((rng.random((300, 40)) * (rng.random((300, 40)) < density)).astype(np.float32))
    target_BE, writes_FE = torch.randn(300, 7), torch.randn(40, 7)
    code = code_of(latents_BF)
    assert isinstance(code, CompressedCode) == (density < SPARSE_DENSITY)
    torch.testing.assert_close(code.cross(target_BE), latents_BF.T @ target_BE)
    torch.testing.assert_close(code.decode(writes_FE), latents_BF @ writes_FE)
    assert code.firings().tolist() == (latents_BF > 0).sum(0).tolist()
    torch.testing.assert_close(code.sum(), latents_BF.double().sum(0))
    gram = Gram(40, CPU)
    for part_BF in latents_BF.split(70):
        gram.add(code_of(part_BF))
    torch.testing.assert_close(gram.total_FF, (latents_BF.T @ latents_BF).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("active", "stored"), [(3, CompressedCode), (10, DenseCode)])
def test_the_code_of_a_topk_dictionary_is_what_it_encodes(active, stored):
    torch.manual_seed(0)
    W_dec_FD = torch.randn(60, 8)
    sae = SparseAutoencoder(W_dec_FD.T.contiguous(), torch.full((60,), -3.0), W_dec_FD, torch.zeros(8), activation=TopK(active))
    acts_BD = torch.randn(200, 8)
    code, latents_BF = encode(sae, acts_BD), sae.encode(acts_BD)
    assert isinstance(code, stored)
    assert (latents_BF > 0).sum(1).min() < active  # of some rows fewer latents are positive
    assert code.firings().tolist() == (latents_BF > 0).sum(0).tolist()
    torch.testing.assert_close(code.decode(torch.eye(60)), latents_BF)


def test_the_variance_of_a_write_is_that_of_its_sums_over_groups():
    latents_NF, target_NE = code_and_target()
    fit = regress(in_groups(latents_NF, target_NE))
    found_F, _ = cluster_variance(in_groups(latents_NF, target_NE), fit, torch.eye(CHANNELS, dtype=torch.float64))

    writes_FE = slow_ridge(latents_NF, target_NE)
    centred_NF = latents_NF - latents_NF.mean(0)
    residual_NE = target_NE - target_NE.mean(0) - centred_NF @ writes_FE
    scores_NFE = np.einsum("nf,gf,ne->nge", centred_NF, fit.inverse_FF.numpy(), residual_NE) / len(latents_NF)
    sums_GFE = np.stack([part.sum(0) for part in np.split(scores_NFE - scores_NFE.mean(0), GROUPS)])
    expected_F = GROUPS / (GROUPS - 1) * (sums_GFE**2).sum((0, 2))
    np.testing.assert_allclose(found_F, expected_F, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_of_a_write_is_that_over_bootstrap_samples_of_groups(seed):
    groups = paired_rows.GROUPS
    latents_NF, target_NE = code_and_target(seed, rows=groups * 120)
    batches = in_groups(latents_NF, target_NE, groups)
    found_F, _ = cluster_variance(batches, regress(batches), torch.eye(CHANNELS, dtype=torch.float64))
    rng, rows_GN = np.random.default_rng(1), np.arange(len(latents_NF)).reshape(groups, -1)
    draws = [rows_GN[rng.integers(groups, size=groups)].ravel() for _ in range(150)]
    resampled_SFE = np.stack([slow_ridge(latents_NF[rows], target_NE[rows]) for rows in draws])
    ratio_F = found_F.numpy()[:-1] / resampled_SFE.var(0).sum(1)[:-1]
    assert ratio_F.mean() == pytest.approx(1, abs=0.2)
    assert ratio_F == pytest.approx(np.ones(len(ratio_F)), abs=0.4)


# --- p-values ----------------------------------------------------------------------------------------------------


def test_p_values_are_the_chance_of_a_larger_change_at_the_minimum_effect():
    freedom, variance, tolerance = 6, 0.02, 0.3
    rng = np.random.default_rng(0)
    noise = rng.normal(0, np.sqrt(variance / freedom), (200_000, freedom))
    noise[:, 0] += tolerance
    drawn = np.linalg.norm(noise, axis=1)
    for change in (0.2, 0.3, 0.4, 0.5):
        p = p_values(np.array([change]), np.array([variance]), freedom, tolerance)
        assert p[0] == pytest.approx((drawn >= change).mean(), abs=0.004)


def test_a_change_without_noise_is_decided_by_its_size():
    p = p_values(np.array([0.2, 0.34, 0.36, 1.0]), np.full(4, 1e-9), 40.0, 0.35)
    assert p.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)


def test_rows_without_any_difference_are_no_evidence():
    assert p_values(np.array([0.0]), np.array([0.0]), 10.0, 0.35).tolist() == [1.0]


def test_adjusted_p_values_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.5, 0.02, 0.04, 0.9])
    # By hand: sorted p·m/rank = 0.05, 0.05, 0.0667, 0.625, 0.9, then the running minimum from the end.
    assert benjamini_hochberg(p).tolist() == pytest.approx([0.05, 0.625, 0.05, 0.2 / 3, 0.9])
    drawn = np.random.default_rng(0).random(500) ** 3
    np.testing.assert_allclose(benjamini_hochberg(drawn), stats.false_discovery_control(drawn))


def at_the_boundary(seed, burst, tolerance=0.35, documents=320, rows=30, latents=40, channels=12):
    """Code and difference of rows whose true changes all have the minimum size; documents have noise of their own.

    Args:
        burst: how much the rate of a latent and the noise go by document.
    """
    rng = np.random.default_rng(seed)
    rate_TF = 0.1 * rng.gamma(1 / burst, burst, (documents, 1, latents))
    latents_NF = (rng.random((documents, rows, latents)) < rate_TF) * rng.uniform(0.5, 1.5, (documents, rows, latents))
    own_FD = rng.normal(size=(latents, channels))
    turned_FD = rng.normal(size=(latents, channels))
    scale_F = tolerance * np.linalg.norm(own_FD, axis=1) / np.linalg.norm(turned_FD, axis=1)
    noise_NE = rng.normal(0, 0.5 * burst, (documents, 1, channels)) + rng.normal(0, 0.5, (documents, rows, channels))
    latents_NF = latents_NF.reshape(-1, latents)
    own_NE = latents_NF @ own_FD
    other_NE = own_NE + latents_NF @ (turned_FD * scale_F[:, None]) + noise_NE.reshape(-1, channels)
    return latents_NF.astype(np.float32), np.concatenate([own_NE, other_NE], 1).astype(np.float32)


def p_at_the_boundary(groups, **kwargs):
    latents_NF, target_NE = at_the_boundary(**kwargs)
    batches = in_groups(latents_NF, target_NE, groups)
    fit = regress(batches)
    own_FD, other_FD = fit.writes_FE.chunk(2, 1)
    eye_DD = torch.eye(own_FD.shape[1], dtype=torch.float64)
    variance_F, freedom = cluster_variance(batches, fit, torch.cat([-eye_DD, eye_DD]))
    length_F = own_FD.norm(dim=1)
    change_F = (other_FD - own_FD).norm(dim=1) / length_F
    return p_values(change_F.numpy(), (variance_F / length_F**2).numpy(), freedom, 0.35)


@pytest.mark.parametrize("burst", [0.1, 1.0])
def test_p_values_are_uniform_at_the_minimum_effect_when_tokens_of_a_document_are_alike(burst):
    p = np.concatenate([p_at_the_boundary(groups=paired_rows.GROUPS, seed=seed, burst=burst) for seed in range(12)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.03)


def test_a_variance_that_took_rows_for_independent_would_be_too_small():
    p = np.concatenate([p_at_the_boundary(groups=1200, seed=seed, burst=1.0, documents=160) for seed in range(4)])
    assert (p < 0.05).mean() > 0.09


# --- tags --------------------------------------------------------------------------------------------------------


def changes(change, firings=1000, own="base", ratio=1.0, angle=45.0, variance=1e-6, freedom=20.0):
    """Results of a dictionary with these changes."""
    count = len(change)
    fill = lambda value: np.broadcast_to(np.asarray(value, float), count).copy()  # noqa: E731
    return WriteChange(
        own=np.full(count, own),
        firings=np.broadcast_to(firings, count).astype(np.int64),
        change=np.asarray(change, float),
        change_raw=np.asarray(change, float),
        ratio=fill(ratio),
        angle=fill(angle),
        variance=fill(variance),
        freedom=freedom,
        energy=fill(0),
        scale_error=fill(1),
        explained=0.0,
    )


def test_a_bulk_at_rest_is_judged_by_the_smallest_effect_that_counts():
    assert minimum_effect(np.full(50, 0.05)) == 0.35
    assert minimum_effect(np.empty(0)) == 0.35


def test_a_bulk_that_moves_raises_the_effect_that_counts():
    bulk = np.random.default_rng(0).normal(0.3, 0.04, 100_001)
    assert minimum_effect(bulk) == pytest.approx(0.3 + 2.5 * 0.04, abs=0.003)
    assert minimum_effect(np.append(bulk, [5.0] * 100)) == pytest.approx(minimum_effect(bulk), abs=0.003)


@pytest.mark.parametrize(
    ("role", "ratio", "angle", "kind"),
    [
        ("base", 0.1, 80, "removed"),
        ("tuned", 0.1, 80, "added"),
        ("base", 1.0, 45, "rotated"),
        ("tuned", 1.1, 120, "rotated"),
        ("base", 2.0, 5, "rescaled"),
        ("tuned", 0.5, 5, "rescaled"),
    ],
)
def test_the_kind_of_a_change_follows_from_length_and_angle(role, ratio, angle, kind):
    assert kinds(role, np.array([ratio]), np.array([angle])).tolist() == [kind]


def test_only_latents_that_fire_often_enough_are_tested():
    base = changes([1.0, 1.0, np.nan, 0.1], firings=[1000, MIN_FIRINGS - 1, 0, 1000])
    tags, _ = tag_pair({"base": base, "tuned": changes([0.1, 0.1, 0.1, 0.1])})
    assert tags["base"].tag.tolist() == ["rotated", "untestable", "dead", "unchanged"]
    assert np.isnan(tags["base"].q).tolist() == [False, True, True, False]
    assert np.isnan(tags["base"].p).tolist() == [False, True, True, False]


def test_false_discoveries_are_controlled_over_both_dictionaries_together():
    rng = np.random.default_rng(0)
    base = changes(rng.uniform(0.3, 0.5, 40), variance=0.01)
    tuned = changes(rng.uniform(0.0, 0.2, 60), variance=0.01)
    tags, tolerance = tag_pair({"base": base, "tuned": tuned})
    together = benjamini_hochberg(np.concatenate([base.p_values(tolerance), tuned.p_values(tolerance)]))
    np.testing.assert_allclose(np.concatenate([tags["base"].q, tags["tuned"].q]), together)
    assert ((tags["base"].q <= 0.05) == (tags["base"].tag != "unchanged")).all()


def test_a_pair_of_dead_dictionaries_has_tags_and_no_test():
    dead = changes([np.nan, np.nan], firings=0)
    tags, tolerance = tag_pair({"base": dead, "tuned": dead})
    assert tags["base"].tag.tolist() == tags["tuned"].tag.tolist() == ["dead", "dead"]
    assert tolerance == 0.35


# --- the linear map ----------------------------------------------------------------------------------------------


DOCUMENTS, DOCUMENT = 80, 25


def stores(folder, base_ND, tuned_ND, tokens=None):
    """Two stores of the same tokens."""
    tokens = tokens or tokens_of(random_documents([DOCUMENT] * (len(base_ND) // DOCUMENT)))
    rows = {"base": base_ND, "tuned": tuned_ND}
    return {role: ActivationStore(write_store(folder / role, tokens, {0: acts_ND})) for role, acts_ND in rows.items()}


def paired(folder, base_ND, tuned_ND):
    return PairedRows(*stores(folder, base_ND, tuned_ND).values(), layer=0)


def mapped_rows(seed=0, rank=2, shift=0.5, rows=DOCUMENTS * DOCUMENT, channels=8):
    """Rows of a base, of a model that shifts and maps them by I + B of low rank, and B."""
    rng = np.random.default_rng(seed)
    base_ND = rng.normal(size=(rows, channels)) @ rng.normal(size=(channels, channels))
    slope_DD = rng.normal(size=(channels, rank)) @ rng.normal(size=(rank, channels)) / channels
    tuned_ND = base_ND @ (np.eye(channels) + slope_DD) + shift + rng.normal(0, 0.05, base_ND.shape)
    return base_ND.astype(np.float32), tuned_ND.astype(np.float32), slope_DD


def test_a_shared_map_is_recovered(tmp_path):
    base_ND, tuned_ND, slope_DD = mapped_rows()
    maps = fit_linear_maps(paired(tmp_path, base_ND, tuned_ND), CPU)
    np.testing.assert_allclose(maps.matrix(2), np.eye(8) + slope_DD, atol=0.02)
    np.testing.assert_array_equal(maps.matrix(0), np.eye(8))


def test_the_shares_of_the_difference_are_those_on_held_out_documents(tmp_path):
    base_ND, tuned_ND, _ = mapped_rows(shift=1.0)
    rows = paired(tmp_path, base_ND, tuned_ND)
    maps = fit_linear_maps(rows, CPU)
    held_out = rows.base.held_out_rows()
    base_ND, tuned_ND = base_ND - base_ND.mean(0), tuned_ND - tuned_ND.mean(0)
    shift = ((maps.mean_tuned_D - maps.mean_base_D) ** 2).sum()
    assert maps.mean_shift * maps.difference == pytest.approx(float(shift), rel=1e-4)
    assert maps.difference == pytest.approx(float(((tuned_ND - base_ND) ** 2).sum(1).mean() + shift), rel=1e-4)
    energy = ((tuned_ND - base_ND)[held_out] ** 2).sum(1).mean() + shift
    for rank in (1, 2, 8):
        left = ((tuned_ND - base_ND @ maps.matrix(rank).numpy())[held_out] ** 2).sum(1).mean()
        explained = 1 - (shift + left) / energy
        assert float(maps.explained_D[:rank].sum()) == pytest.approx(float(explained), abs=1e-4)


@pytest.mark.parametrize("own", ["base", "tuned"])
def test_changes_at_every_rank_are_those_of_each_map_on_its_own(tmp_path, own):
    maps = fit_linear_maps(paired(tmp_path, *mapped_rows()[:2]), CPU)
    base_FD, tuned_FD = torch.randn(2, 5, 8, dtype=torch.float64)
    found_FR = maps.changes(base_FD, tuned_FD, own)
    for rank in range(9):
        image_FD = base_FD @ maps.matrix(rank)
        length_F = (image_FD if own == "base" else tuned_FD).norm(dim=1)
        torch.testing.assert_close(found_FR[:, rank], (tuned_FD - image_FD).norm(dim=1) / length_F)


def test_the_rank_is_the_smallest_that_makes_the_median_latent_change_nearly_least():
    changes_FR = torch.tensor([[0.5, 0.2, 0.100, 0.099], [0.5, 0.2, 0.100, 0.099], [0.1, 0.2, 0.900, 0.900]])
    assert shared_rank(changes_FR) == 2


def test_latents_at_rest_share_no_map():
    assert shared_rank(torch.tensor([[0.04, 0.01], [0.03, 0.0], [1.0, 0.9]])) == 0


def test_a_map_that_serves_one_latent_alone_is_left_out():
    assert shared_rank(torch.tensor([[0.02, 0.1, 0.2], [0.03, 0.1, 0.2], [1.0, 0.1, 0.1]])) == 0


# --- pairs of stores ---------------------------------------------------------------------------------------------


def test_documents_are_not_split_between_groups(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    tokens = tokens_of(random_documents(lengths))
    acts_ND = np.random.default_rng(1).normal(size=(lengths.sum(), 4)).astype(np.float32)
    both = stores(tmp_path, acts_ND, acts_ND, tokens)
    rows = PairedRows(both["base"], both["tuned"], 0)
    assert set(rows.edges) <= set(both["base"].start)
    batches = list(rows.batches(CPU))
    np.testing.assert_array_equal(torch.cat([batch.base_BD for batch in batches]), acts_ND)
    assert sorted({batch.group for batch in batches}) == list(range(rows.groups))
    assert torch.cat([batch.held_out_B for batch in batches]).tolist() == both["base"].held_out_rows().tolist()


def test_stores_of_other_tokens_are_refused(tmp_path):
    acts_ND = np.zeros((40, 4), np.float32)
    base = ActivationStore(write_store(tmp_path / "a", tokens_of(random_documents([2] * 20, seed=0)), {0: acts_ND}))
    other = ActivationStore(write_store(tmp_path / "b", tokens_of(random_documents([2] * 20, seed=1)), {0: acts_ND}))
    with pytest.raises(RlsaeError, match=r"b/store/activations.zarr holds other tokens than .*a/store.*; dump both"):
        PairedRows(base, other, 0)


def test_too_few_documents_for_a_variance_are_refused(tmp_path):
    acts_ND = np.zeros((75, 4), np.float32)
    with pytest.raises(RlsaeError, match=r"holds 3 documents; a variance between documents needs 16: raise"):
        paired(tmp_path, acts_ND, acts_ND)


# --- nulls -------------------------------------------------------------------------------------------------------


def test_equal_models_have_no_change(tmp_path):
    base_ND, _, _ = mapped_rows()
    sae = SparseAutoencoder(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8))
    rows = paired(tmp_path, base_ND, base_ND)
    found, rank = write_changes({"base": sae, "tuned": sae}, rows, fit_linear_maps(rows, CPU), CPU)
    assert rank == 0
    tags, _ = tag_pair(found)
    for role in ("base", "tuned"):
        assert found[role].change.tolist() == pytest.approx([0] * 8, abs=1e-9)
        assert tags[role].tag.tolist() == ["unchanged"] * 8


def test_disjoint_documents_of_one_model_have_no_tags():
    halves = []
    for half in range(2):
        latents_NF, target_NE = at_the_boundary(seed=5, burst=1.0, tolerance=0.0, documents=640)
        chosen = slice(half * len(latents_NF) // 2, (half + 1) * len(latents_NF) // 2)
        batches = in_groups(latents_NF[chosen], target_NE[chosen][:, 12:], paired_rows.GROUPS)
        fit = regress(batches)
        halves.append((fit, *cluster_variance(batches, fit, torch.eye(12, dtype=torch.float64))))
    (own, own_variance_F, freedom), (other, other_variance_F, _) = halves
    length_F = own.writes_FE.norm(dim=1)
    change_F = (other.writes_FE - own.writes_FE).norm(dim=1) / length_F
    variance_F = (own_variance_F + other_variance_F) / length_F**2
    found = changes(change_F.numpy(), own.firings_F.numpy(), variance=variance_F.numpy(), freedom=freedom)
    tags, _ = tag_pair({"base": found, "tuned": found})
    assert set(tags["base"].tag) == {"unchanged"}
    # What is left is the noise that the variance promises.
    assert float((change_F**2).mean() / variance_F.mean()) == pytest.approx(1, abs=0.25)
