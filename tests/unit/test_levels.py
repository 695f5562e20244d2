"""The levels of change: what they say of a layer that moves as a whole, and of one that does not move at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_store

from rlsae.activations.store import ActivationStore
from rlsae.comparison.changes import pair_change
from rlsae.comparison.kinds import CHANGED
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import moved_share
from rlsae.comparison.write_change import RIDGE, WriteChange
from rlsae.sae.dictionary import SparseAutoencoder

CPU = torch.device("cpu")
CHANNELS = 8


def found(change):
    """Results of a dictionary whose latents changed so much, measured almost exactly."""
    change = np.asarray(change, float)
    rest = {name: np.ones(len(change)) for name in ("ratio", "angle", "energy", "scale_error")}
    firings, variance = np.full(len(change), 1000), np.full(len(change), 1e-8)
    own = np.full(len(change), "base")
    return WriteChange(own, firings, change, change, variance=variance, freedom=20.0, explained=0.0, **rest)


def test_the_share_that_moves_counts_all_latents_of_both_dictionaries_whatever_the_bulk_does():
    assert moved_share({"base": found([0.1] * 8 + [0.9] * 2), "tuned": found([0.1] * 10)}) == pytest.approx(0.1)
    assert moved_share({"base": found([0.9] * 10), "tuned": found([0.8] * 10)}) == 1


def test_without_tested_latents_no_share_is_known():
    never = found([0.5])
    never.firings[:] = 0
    assert np.isnan(moved_share({"base": never, "tuned": never}))


def levels_of(tmp_path, tuned_ND, base_ND):
    tokens = tokens_of(random_documents([10] * 200))
    acts = {"base": base_ND, "tuned": tuned_ND}
    stores = [ActivationStore(write_store(tmp_path / role, tokens, {0: acts_ND})) for role, acts_ND in acts.items()]
    rows = PairedRows(*stores, 0)
    sae = SparseAutoencoder(torch.eye(CHANNELS), torch.zeros(CHANNELS), torch.eye(CHANNELS), torch.zeros(CHANNELS))
    return pair_change({"base": sae, "tuned": sae}, rows, fit_linear_maps(rows, CPU), CPU)


def test_a_tuning_that_changed_nothing_has_no_tags_and_no_shares(tmp_path):
    base_ND = np.maximum(np.random.default_rng(0).normal(size=(2000, CHANNELS)), 0)
    change = levels_of(tmp_path, base_ND, base_ND)
    for level in change.levels:
        assert (level["difference"], level["moved"], level["rank"]) == (0, 0, 0)
        assert np.isnan([level[name] for name in ("mean_shift", "latents", "tagged")]).all()
    for columns in change.columns.values():
        assert not columns.tag.isin(CHANGED).any()


def test_the_shares_of_a_difference_that_one_latent_makes_are_its_own(tmp_path):
    base_ND = np.maximum(np.random.default_rng(0).normal(size=(2000, CHANNELS)), 0)
    tuned_ND = base_ND.copy()
    tuned_ND[:, 0] = 0
    change = levels_of(tmp_path, tuned_ND, base_ND)
    assert change.columns["base"].tag.tolist() == ["removed"] + ["unchanged"] * (CHANNELS - 1)
    of_base = change.levels[0]
    shortened = (1 / (1 + RIDGE)) ** 2  # by the ridge
    assert of_base["tagged"] == pytest.approx((1 - of_base["mean_shift"]) * shortened, rel=0.02)
    assert of_base["moved"] == pytest.approx(1 / (2 * CHANNELS - 1))  # the tuned dictionary's latent never fires
