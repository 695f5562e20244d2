"""Partners of latents in another dictionary, and the mean of their cosines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_comparisons import directions

from rlsae.comparison import matching as module
from rlsae.comparison.matching import Matching, match, match_nearest, mmcs, percentile

PARTNERLESS = -1


def alive(*flags):
    return np.array(flags, bool)


@pytest.fixture
def blocks_of(monkeypatch):
    """Function that sets how many latents are looked at together."""
    return lambda count: monkeypatch.setattr(module, "BLOCK", count)


# --- one-to-one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("own", "other"), [(5, 5), (3, 6), (6, 3), (1, 4)])
def test_partners_have_the_largest_sum_of_cosines_of_all_pairings(own, other, seed):
    own_FD, other_GD = directions(own, seed), directions(other, seed + 100)
    found = match(own_FD, other_GD, np.ones(own, bool), np.ones(other, bool))
    cosines = own_FD @ other_GD.T
    if own <= other:
        best = max(sum(cosines[f, g] for f, g in enumerate(chosen)) for chosen in itertools.permutations(range(other), own))
    else:
        best = max(sum(cosines[f, g] for g, f in enumerate(chosen)) for chosen in itertools.permutations(range(own), other))
    assert np.nansum(found.cosine) == pytest.approx(best)
    partners = found.partner[found.partner != PARTNERLESS]
    assert len(set(partners)) == len(partners) == min(own, other)


def test_a_cosine_is_that_of_a_latent_with_its_partner():
    own_FD, other_GD = directions(4), directions(6, 1)
    found = match(own_FD, other_GD, np.ones(4, bool), np.ones(6, bool))
    for latent in range(4):
        assert found.cosine[latent] == pytest.approx(own_FD[latent] @ other_GD[found.partner[latent]])


def test_a_dictionary_shuffled_is_matched_with_itself():
    own_FD, order = directions(7), np.array([3, 0, 6, 1, 5, 2, 4])
    found = match(own_FD, own_FD[order], np.ones(7, bool), np.ones(7, bool))
    assert order[found.partner].tolist() == list(range(7))
    assert found.cosine == pytest.approx(np.ones(7))


def test_dead_latents_have_no_partner_and_are_nobodys_partner():
    own_FD = directions(3)
    found = match(own_FD, own_FD, alive(True, False, True), alive(True, True, False))
    assert found.partner[1] == PARTNERLESS
    assert np.isnan(found.cosine[1])
    assert set(found.partner[[0, 2]]) == {0, 1}


def test_a_dictionary_without_live_latents_matches_nothing():
    found = match(directions(3), directions(2), np.ones(3, bool), np.zeros(2, bool))
    assert found.partner.tolist() == [PARTNERLESS] * 3
    assert np.isnan(found.cosine).all()


# --- nearest neighbours ------------------------------------------------------------------------------------------


def test_the_nearest_latent_has_the_largest_cosine_and_may_be_shared(blocks_of):
    own_FD, other_GD = directions(9), directions(5, 1)
    live = alive(True, False, True, True, True)
    blocks_of(4)
    found = match_nearest(own_FD, other_GD, np.arange(9) != 3, live)
    for latent in set(range(9)) - {3}:
        cosines = {g: own_FD[latent] @ other_GD[g] for g in np.flatnonzero(live)}
        assert found.partner[latent] == max(cosines, key=cosines.get)
        assert found.cosine[latent] == pytest.approx(max(cosines.values()))
    assert found.partner[3] == PARTNERLESS
    assert np.isnan(found.cosine[3])
    assert len(set(found.partner)) < 9


@pytest.mark.parametrize("seed", range(5))
def test_many_latents_are_partners_where_each_is_nearest_to_the_other(monkeypatch, blocks_of, seed):
    own_FD, other_GD = directions(9, seed), directions(7, seed + 100)
    monkeypatch.setattr(module, "ASSIGNABLE", 8)
    blocks_of(4)
    found = match(own_FD, other_GD, np.ones(9, bool), np.ones(7, bool))
    cosines_FG = own_FD @ other_GD.T
    expected = [PARTNERLESS] * 9
    for f, g in itertools.product(range(9), range(7)):
        if cosines_FG[f, g] == cosines_FG[f].max() == cosines_FG[:, g].max():
            expected[f] = g
    assert found.partner.tolist() == expected
    paired = found.partner != PARTNERLESS
    np.testing.assert_allclose(found.cosine[paired], cosines_FG[paired, found.partner[paired]])
    assert np.isnan(found.cosine[~paired]).all()


def test_a_large_dictionary_shuffled_is_matched_with_itself(monkeypatch, blocks_of):
    own_FD, order = directions(50), np.random.default_rng(2).permutation(50)
    monkeypatch.setattr(module, "ASSIGNABLE", 8)
    blocks_of(16)
    found = match(own_FD, own_FD[order], np.ones(50, bool), np.ones(50, bool))
    assert order[found.partner].tolist() == list(range(50))


def test_it_is_the_live_latents_that_are_too_many(monkeypatch):
    own_FD, other_FD = directions(12), directions(12, 1)
    live = np.arange(12) < 8
    exact = match(own_FD, other_FD, live, live)
    monkeypatch.setattr(module, "ASSIGNABLE", 8)
    assert match(own_FD, other_FD, live, live).partner.tolist() == exact.partner.tolist()
    assert (exact.partner[:8] != PARTNERLESS).all()


# --- mean cosines ------------------------------------------------------------------------------------------------


def matching(*cosines):
    return Matching(np.arange(len(cosines)), np.array(cosines))


def test_the_mean_cosine_is_taken_over_all_latents_with_a_partner_and_lies_in_its_interval():
    mean, (low, high), count = mmcs([matching(0.9, 0.8, np.nan), matching(0.1)])
    assert mean == pytest.approx(0.6)
    assert count == 3
    assert 0.1 <= low < mean < high <= 0.9


def test_the_interval_narrows_with_the_number_of_latents():
    cosines = np.random.default_rng(0).uniform(size=800)
    (low, high), (narrow_low, narrow_high) = (mmcs([matching(*cosines[:n])])[1] for n in (50, 800))
    assert narrow_high - narrow_low == pytest.approx((high - low) / 4, rel=0.3)


def test_no_partners_have_no_mean():
    mean, interval, count = mmcs([])
    assert np.isnan([mean, *interval]).all()
    assert count == 0


def test_a_percentile_is_the_share_of_the_reference_at_or_below():
    reference = np.array([0.1, np.nan, 0.3, 0.2, 0.4])
    found = percentile(np.array([0.05, 0.1, 0.25, 0.4, 0.9, np.nan]), reference)
    assert found[:5].tolist() == [0, 25, 50, 100, 100]
    assert np.isnan(found[5])


def test_without_a_reference_there_is_no_percentile():
    assert np.isnan(percentile(np.array([0.5]), np.array([np.nan]))).all()
