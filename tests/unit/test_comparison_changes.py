"""Latents that a tuning changed, as the comparison tags and counts them, and pairs that it refuses."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import finish, random_documents, tokens_of, write_dictionaries, write_store
from small_comparisons import CHANNELS, dictionary, write_policies

from rlsae.artifacts import Manifest
from rlsae.comparison.kinds import TAGS
from rlsae.comparison.latent_scaling import Part, scale_error
from rlsae.comparison.replication import replicated
from rlsae.comparison.stage import build_comparison, check_same_training_rows
from rlsae.errors import RlsaeError


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


def changed_rows(role, tokens):
    """Rows of a latent per channel, each on a fifth of the rows; the tuned model removes the first and doubles the second."""
    writes_FD = np.eye(CHANNELS)
    if role == "tuned":
        writes_FD[0], writes_FD[1] = 0, 2 * writes_FD[1]
    return (np.random.default_rng(0).random((len(tokens.token), CHANNELS)) < 0.2) @ writes_FD


@pytest.fixture(scope="module")
def compare(tokenizer, tmp_path_factory):
    """Function of a folder and changes: a comparison of dictionaries that read the channels of a model and of a changed one."""
    policies = write_policies(tmp_path_factory.mktemp("policies"), tokenizer)
    return lambda folder, **changes: build(folder, policies, **changes)


def build(folder, policies, seeds=(0, 1), tuned_tokens=None, channels=CHANNELS):
    tokens = {"base": tokens_of(random_documents([100] * 64))}
    tokens["tuned"] = tuned_tokens or tokens["base"]
    stores, dictionaries = {}, {}
    for role in ("base", "tuned"):
        stores[role] = write_store(folder / "activations" / role, tokens[role], {0: changed_rows(role, tokens[role])})
        own = {seed: dictionary(np.eye(channels), bias=-0.1) for seed in seeds}
        dictionaries[role, 0, "small"] = write_dictionaries(folder / "dictionaries" / role, own)
    settings = {"dictionaries": ["small"], "sizes": None}
    build_comparison(settings, folder / "comparison", None, dictionaries, stores, **policies)
    return folder / "comparison"


@pytest.fixture(scope="module")
def changed(tmp_path_factory, compare):
    """Folder of a comparison with a removed and a doubled latent; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return compare(tmp_path_factory.mktemp("changed"))


def test_changed_latents_are_tagged_and_the_others_are_not(changed):
    table = pd.read_parquet(changed / "latents.parquet")
    for seed in (0, 1):
        of_seed = table[table.seed == seed].set_index(["role", "latent"])
        assert of_seed.tag["base"].tolist() == ["removed", "rescaled"] + ["unchanged"] * 6
        assert of_seed.tag["tuned"].tolist() == ["dead", "rescaled"] + ["unchanged"] * 6
        assert of_seed.write_ratio["base", 1] == pytest.approx(2, abs=0.3)
        assert of_seed.write_ratio["tuned", 1] == pytest.approx(0.5, abs=0.1)
        assert of_seed.scale_error["base", 0] == pytest.approx(0, abs=0.01)
        assert of_seed.scale_error["base", 2] == pytest.approx(1, abs=0.01)


def test_tags_are_counted_in_the_manifest(changed):
    table = pd.read_parquet(changed / "latents.parquet")
    tags = Manifest.read(changed).metrics["layers"]["0"]["dictionaries"]["small"]["tags"]
    assert tags == {"replicated": 6} | {tag: int((table.tag == tag).sum()) for tag in TAGS}
    assert tags["removed"] == 2
    assert tags["rescaled"] == 4


def test_levels_say_how_much_of_the_difference_each_one_holds(changed):
    levels = pd.read_parquet(changed / "levels.parquet")
    assert levels.groupby(["layer", "dictionary", "seed", "role"]).size().tolist() == [1] * 4
    shares = levels[["mean_shift", "linear_map", "latents"]]
    assert ((shares >= -0.01) & (shares <= 1)).all(axis=None)
    assert (shares.sum(axis=1) <= 1.01).all()
    assert (levels.minimum_effect >= 0.35).all()
    # A fifth of the rows lose a vector of length 1, a fifth gain one; a channel's variance is 0.2 · 0.8.
    assert levels.difference.to_numpy() == pytest.approx(2 * 0.2 / (CHANNELS * 0.2 * 0.8), rel=0.1)
    # The lost and the gained vector have means of 0.2; the rest of the difference is what the two latents write.
    assert levels.mean_shift.to_numpy() == pytest.approx(0.2, abs=0.02)
    assert (levels["rank"] == 0).all()
    assert levels[levels.role == "base"].latents.to_numpy() == pytest.approx(0.8, abs=0.03)


def test_with_one_seed_nothing_is_said_of_replication(tmp_path, compare):
    out = compare(tmp_path, seeds=(0,))
    table = pd.read_parquet(out / "latents.parquet")
    assert (table.tag == "removed").any()
    assert table.replicated.isna().all()
    assert Manifest.read(out).metrics["layers"]["0"]["dictionaries"]["small"]["tags"]["replicated"] is None


def test_a_tag_is_replicated_if_a_tagged_latent_of_another_seed_writes_nearly_the_same():
    decoders = {0: np.eye(3), 1: np.array([[0.8, 0.6, 0], [0, 1, 0], [0, 0, 1.0]])}
    tags = {0: ["removed", "rotated", "unchanged"], 1: ["added", "unchanged", "dead"]}
    found = replicated({seed: np.array(tag) for seed, tag in tags.items()}, decoders)
    assert found[0].tolist() == [True, False, pd.NA]
    assert found[1].tolist() == [True, pd.NA, pd.NA]


def test_latent_scaling_is_the_regression_of_the_error_on_the_latents_own_part():
    rng = np.random.default_rng(0)
    latents_NF = np.maximum(rng.normal(size=(500, 3)), 0)
    W_dec_FD, b_dec_D = rng.normal(size=(3, 4)), rng.normal(size=4)
    models = [latents_NF @ W_dec_FD * size + b_dec_D + rng.normal(size=(500, 4)) for size in (1.0, 0.4)]
    betas_MF = np.empty((2, 3))
    for model, acts_ND in enumerate(models):
        error_ND = acts_ND - latents_NF @ W_dec_FD - b_dec_D
        for latent in range(3):
            part_ND = np.outer(latents_NF[:, latent], W_dec_FD[latent])
            betas_MF[model, latent] = (part_ND * (error_ND + part_ND)).sum() / (part_ND**2).sum()
    covariance_FF, mean_F = torch.from_numpy(np.cov(latents_NF.T, bias=True)), torch.from_numpy(latents_NF.mean(0))
    base, tuned = (Part(*map(torch.from_numpy, (latents_NF.T @ acts_ND / 500, W_dec_FD, b_dec_D))) for acts_ND in models)
    own_is_base_F = torch.tensor([True, True, False])
    found_F = scale_error(covariance_FF, mean_F, base, tuned, own_is_base_F)
    np.testing.assert_allclose(found_F, np.where(own_is_base_F, betas_MF[1] / betas_MF[0], betas_MF[0] / betas_MF[1]))


def test_stores_of_other_tokens_than_each_other_are_refused(tmp_path, compare):
    other = tokens_of(random_documents([100] * 64, seed=1))
    with pytest.raises(RlsaeError, match=r"tuned/store/activations.zarr holds other tokens than .*; dump both policies"):
        compare(tmp_path, tuned_tokens=other)


@pytest.mark.parametrize(("tuned", "refused"), [("a", False), ("b", True)])
def test_dictionaries_that_were_trained_on_other_rows_are_no_pair(tmp_path, tuned, refused):
    folders = {
        (role, 2, "small"): finish(tmp_path / role, "dictionaries", metrics={"seed0": {"rows_digest": digest}})
        for role, digest in (("base", "a"), ("tuned", tuned))
    }
    if refused:
        with pytest.raises(RlsaeError, match="layer 2, dictionary small, seed0: base and tuned were trained on other rows"):
            check_same_training_rows(folders)
    else:
        check_same_training_rows(folders)


def test_a_dictionary_of_another_width_than_the_rows_is_refused(tmp_path, compare):
    with pytest.raises(RlsaeError, match=r"seed0 reads rows of 5 channels, layer 0 of .* has 8; compare dictionaries"):
        compare(tmp_path, channels=5)
