"""Latents of base and tuned side by side: matching, similarities, and the table of latents."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import finish, random_documents, tokens_of, write_dictionaries, write_store

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.comparison.latent_scaling import scale_error
from rlsae.comparison.matching import Matching, match, mmcs, percentile
from rlsae.comparison.members import measure
from rlsae.comparison.replication import replicated
from rlsae.comparison.stage import build_comparison, check_same_training_rows
from rlsae.comparison.tags import TAGS
from rlsae.errors import RlsaeError
from rlsae.sae.dictionary import SparseAutoencoder

CPU = torch.device("cpu")
CHANNELS = 8
LATENTS = {"small": 6, "big": 10}
KEY = ["role", "layer", "dictionary", "seed", "latent"]
ACTIVITY = ["firings", "density", "mean_active", "max_active"]
CHANGES = "write_change write_change_raw write_ratio write_angle p q tag replicated".split()
MATCHES = "match_latent match_cosine_decoder match_cosine_encoder match_jaccard match_pearson".split()
SIZE_MATCHES = ["match_size_latent", "match_size_cosine"]
DESCRIPTION = ["floor_percentile", "scale_error", "density_shift"]
DEAD = 2
"""A latent of every dictionary that never fires."""
PARTNERLESS = -1


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


def directions(count, seed=0, channels=CHANNELS):
    rows = np.random.default_rng(seed).normal(size=(count, channels))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def alive(*flags):
    return np.array(flags, bool)


# --- matching ----------------------------------------------------------------------------------------------------


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


# --- what latents do ---------------------------------------------------------------------------------------------


def dictionary(rows_FD, bias=0.0, encoder_FD=None):
    """A dictionary whose latents write and, unless told otherwise, read these directions."""
    decoder_FD = torch.tensor(rows_FD, dtype=torch.float32)
    encoder_FD = decoder_FD if encoder_FD is None else torch.tensor(encoder_FD, dtype=torch.float32)
    b_enc_F = torch.full((len(decoder_FD),), float(bias))
    return SparseAutoencoder(encoder_FD.T.contiguous(), b_enc_F, decoder_FD, torch.zeros(decoder_FD.shape[1]))


def test_firings_and_sizes_are_those_of_the_held_out_rows(tmp_path):
    tokens = tokens_of(random_documents([2, 3]), held_out=[False, True])
    acts = np.array([[99, 99], [99, 99], [1, 0], [4, -2], [-3, -2]], float)
    store = ActivationStore(write_store(tmp_path / "a", tokens, {0: acts}))
    member = measure(dictionary(np.eye(2)), store, 0, CPU)
    assert member.firings.tolist() == [2, 0]
    assert member.density == pytest.approx([2 / 3, 0])
    assert member.mean_active.tolist() == [2.5, 0]
    assert member.max_active.tolist() == [4, 0]
    assert member.alive.tolist() == [True, False]


# --- the stage ---------------------------------------------------------------------------------------------------


def members(role, name, seeds):
    """Random dictionaries by seed; those of the tuned policy lie near those of the base, and latent DEAD never fires."""
    found = {}
    for seed in seeds:
        rows_FD = directions(LATENTS[name], seed=[seed, LATENTS[name]])
        if role == "tuned":
            rows_FD = rows_FD + 0.3 * directions(len(rows_FD), seed=seed + 50)
        sae = dictionary(rows_FD)
        sae.b_enc_F[DEAD] = -1e6
        found[seed] = sae
    return found


def build(results, names=("small", "big"), sizes=True, seeds=None, layers=(0, 3), make=members):
    """Folder of a comparison of two policies on layers 0 and 3 with two sizes and two seeds, but for some changes."""
    tokens = tokens_of(random_documents([10] * 24))
    stores, dictionaries = {}, {}
    for number, (role, policy) in enumerate([("base", "tiny"), ("tuned", "tiny.ppo")]):
        acts = np.random.default_rng(number).normal(size=(240, CHANNELS))
        stores[role] = results / "activations" / f"{policy}.reviews" / "mlp"
        write_store(stores[role], tokens, dict.fromkeys(layers, acts))
        for layer, name in itertools.product(layers, names):
            path = results / "dictionaries" / f"{policy}.reviews" / f"layer{layer}" / name
            own = make(role, name, (seeds or {}).get(role, (0, 1)))
            dictionaries[role, layer, name] = write_dictionaries(path, own)
    settings = {"dictionaries": list(names), "sizes": {"small": "small", "big": "big"} if sizes else None}
    out = results / "comparison" / "main"
    build_comparison(settings, out, None, dictionaries, stores)
    return out


@pytest.fixture
def compare(tmp_path):
    """Function of changes: folder of a comparison that is made with them."""
    return lambda **changes: build(tmp_path / "results", **changes)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Folder of the comparison without changes; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return build(tmp_path_factory.mktemp("comparison") / "results")


@pytest.fixture(scope="module")
def table(full):
    return pd.read_parquet(full / "latents.parquet")


def test_the_table_has_the_documented_columns_and_a_row_per_latent(table):
    assert list(table.columns) == KEY + ACTIVITY + CHANGES + MATCHES + SIZE_MATCHES + DESCRIPTION
    assert not table.duplicated(KEY).any()
    assert len(table) == 2 * 2 * 2 * sum(LATENTS.values())
    assert table.groupby(["role", "layer", "dictionary", "seed"]).ngroups == 16


def test_matches_are_mutual(table):
    tuned = table[table.role == "tuned"].set_index(["layer", "dictionary", "seed", "latent"])
    pairs = table[(table.role == "base") & (table.match_latent != PARTNERLESS)]
    assert len(pairs) == 2 * 2 * (sum(LATENTS.values()) - 2)
    for row in pairs.itertuples():
        partner = tuned.loc[(row.layer, row.dictionary, row.seed, row.match_latent)]
        assert partner.match_latent == row.latent
        assert partner.match_cosine_decoder == row.match_cosine_decoder
        assert partner.match_cosine_encoder == pytest.approx(row.match_cosine_encoder)


def test_dead_latents_have_rows_and_no_match(table):
    dead = table[table.latent == DEAD]
    assert (dead.firings == 0).all()
    assert (dead[["match_latent", "match_size_latent"]] == PARTNERLESS).all(axis=None)
    assert dead[["match_cosine_decoder", "match_cosine_encoder", "floor_percentile", "match_size_cosine"]].isna().all(axis=None)
    assert (table[table.latent != DEAD].firings > 0).all()


def test_decoder_and_encoder_cosines_are_those_of_their_own_directions(compare):
    def make(role, name, seeds):
        rows_FD = directions(LATENTS[name], seed=1)
        encoder_FD = rows_FD if role == "base" else rows_FD + 2 * directions(LATENTS[name], seed=9)
        return {seed: dictionary(rows_FD, encoder_FD=encoder_FD) for seed in seeds}

    table = pd.read_parquet(compare(make=make, names=["small"], sizes=False, layers=[0]) / "latents.parquet")
    assert table.match_cosine_decoder.to_numpy() == pytest.approx(np.ones(len(table)))
    rows_FD = directions(6, seed=1)
    moved_FD = rows_FD + 2 * directions(6, seed=9)
    expected = (rows_FD * moved_FD).sum(1) / np.linalg.norm(moved_FD, axis=1)
    base = table[(table.role == "base") & (table.seed == 0)]
    assert base.match_cosine_encoder.to_numpy() == pytest.approx(expected, abs=1e-6)


def test_matches_between_sizes_are_mutual_within_a_policy_and_seed(table):
    key = ["role", "layer", "seed", "latent"]
    big = table[table.dictionary == "big"].set_index(key)
    small = table[(table.dictionary == "small") & (table.match_size_latent != PARTNERLESS)]
    assert len(small) == 2 * 2 * 2 * (LATENTS["small"] - 1)
    for row in small.itertuples():
        partner = big.loc[(row.role, row.layer, row.seed, row.match_size_latent)]
        assert partner.match_size_latent == row.latent
        assert partner.match_size_cosine == pytest.approx(row.match_size_cosine)


def test_the_floor_holds_the_matches_between_two_seeds_of_one_policy(full):
    floor, table = pd.read_parquet(full / "floor.parquet"), pd.read_parquet(full / "latents.parquet")
    assert set(floor.role) == {"base", "tuned"}
    assert (floor.seed < floor.other_seed).all()
    mine = floor.query("layer == 3 and dictionary == 'big'").match_cosine_decoder
    rows = table.query("layer == 3 and dictionary == 'big'")
    expected = percentile(rows.match_cosine_decoder.to_numpy(), mine.to_numpy())
    np.testing.assert_array_equal(rows.floor_percentile, expected)
    assert rows.floor_percentile.max() == 100


def test_every_figure_stands_in_the_manifest_with_its_interval_and_in_the_aggregates(full):
    metrics, aggregates = Manifest.read(full).metrics, pd.read_parquet(full / "aggregates.parquet")
    assert list(aggregates.columns) == ["layer", "dictionary", "measure", "value", "ci_low", "ci_high", "latents"]
    assert metrics["layers"].keys() == {"0", "3"}
    counted = 0
    for layer, entry in metrics["layers"].items():
        assert entry.keys() == {"sizes", "dictionaries"}
        assert entry["dictionaries"].keys() == {"small", "big"}
        groups = [("small→big", entry["sizes"], ["mmcs_small_big_base", "mmcs_small_big_tuned"])]
        names = ["mmcs_base_tuned", "mmcs_base_tuned_other_seed", "mmcs_floor"]
        groups += [(name, figures, names) for name, figures in entry["dictionaries"].items()]
        for name, figures, measures in groups:
            assert figures.keys() - {"tags"} == {*measures, *(f"{key}_ci95" for key in measures)}
            for key in measures:
                low, high = figures[f"{key}_ci95"]
                assert low < figures[key] < high
                row = aggregates[
                    (aggregates.layer == int(layer)) & (aggregates.dictionary == name) & (aggregates.measure == key)
                ]
                assert row[["value", "ci_low", "ci_high"]].to_numpy().tolist() == [[figures[key], low, high]]
                counted += 1
    assert counted == len(aggregates)


def test_the_similarity_of_a_pair_is_the_mean_of_its_rows(full):
    table = pd.read_parquet(full / "latents.parquet").query("role == 'base' and layer == 0 and dictionary == 'small'")
    figures = Manifest.read(full).metrics["layers"]["0"]["dictionaries"]["small"]
    assert figures["mmcs_base_tuned"] == pytest.approx(table.match_cosine_decoder.mean())


def test_the_similarity_between_sizes_is_over_the_latents_of_the_small_one(full):
    table = pd.read_parquet(full / "latents.parquet").query("role == 'tuned' and layer == 0 and dictionary == 'small'")
    figures = Manifest.read(full).metrics["layers"]["0"]["sizes"]
    assert figures["mmcs_small_big_tuned"] == pytest.approx(table.match_size_cosine.mean())


def test_pairs_of_one_seed_are_not_counted_among_those_of_two(full):
    figures = Manifest.read(full).metrics["layers"]["0"]["dictionaries"]["small"]
    assert figures["mmcs_base_tuned"] > 0.9
    assert figures["mmcs_base_tuned_other_seed"] < 0.8
    assert figures["mmcs_floor"] < 0.8


def test_a_base_compared_with_itself_is_entirely_alike(compare):
    metrics = Manifest.read(compare(make=lambda role, name, seeds: members("base", name, seeds))).metrics
    for entry in metrics["layers"].values():
        for figures in entry["dictionaries"].values():
            assert figures["mmcs_base_tuned"] == pytest.approx(1, abs=1e-6)
            assert figures["mmcs_base_tuned_other_seed"] == pytest.approx(figures["mmcs_floor"])


def test_one_seed_alone_has_no_floor_and_says_so_with_none(compare):
    out = compare(seeds={"base": [0], "tuned": [0]})
    figures = Manifest.read(out).metrics["layers"]["3"]["dictionaries"]["big"]
    for key in ("mmcs_floor", "mmcs_base_tuned_other_seed"):
        assert figures[key] is None
        assert figures[f"{key}_ci95"] is None
    assert figures["mmcs_base_tuned"] is not None
    assert pd.read_parquet(out / "latents.parquet").floor_percentile.isna().all()
    assert len(pd.read_parquet(out / "floor.parquet")) == 0


def test_one_seed_alone_leaves_the_columns_of_the_floor_as_they_are(compare, full):
    alone = pd.read_parquet(compare(seeds={"base": [0], "tuned": [0]}) / "floor.parquet")
    assert list(alone.columns) == list(pd.read_parquet(full / "floor.parquet").columns)


def test_a_study_without_sizes_has_no_figures_of_sizes(compare):
    out = compare(sizes=False, names=["small"])
    metrics = Manifest.read(out).metrics
    assert all("sizes" not in entry for entry in metrics["layers"].values())
    assert not pd.read_parquet(out / "aggregates.parquet").measure.str.startswith("mmcs_small_big").any()
    assert list(pd.read_parquet(out / "latents.parquet").columns) == KEY + ACTIVITY + CHANGES + MATCHES + DESCRIPTION


def test_a_policy_whose_latents_are_all_dead_has_rows_and_no_similarity(compare):
    def make(role, name, seeds):
        bias = -1e6 if role == "tuned" else 0.0
        return {seed: dictionary(directions(LATENTS[name], seed=seed), bias) for seed in seeds}

    out = compare(make=make)
    figures = Manifest.read(out).metrics["layers"]["0"]["dictionaries"]["small"]
    assert figures["mmcs_base_tuned"] is None
    assert figures["mmcs_floor"] is not None  # that of the base
    assert (pd.read_parquet(out / "latents.parquet").match_latent == PARTNERLESS).all()


@pytest.mark.parametrize(("base", "tuned", "seed", "role"), [([0, 1], [0], 1, "base"), ([0], [0, 2], 2, "tuned")])
def test_seeds_that_only_one_policy_has_are_refused_with_layer_dictionary_and_seed(compare, base, tuned, seed, role):
    with pytest.raises(RlsaeError, match=rf"layer 0, dictionary small: seed {seed} was trained for {role} and not for"):
        compare(seeds={"base": base, "tuned": tuned})


def test_equal_comparisons_give_equal_bytes(compare, full):
    assert (compare() / MANIFEST).read_bytes() == (full / MANIFEST).read_bytes()


def test_the_manifest_names_every_dictionary_and_store(compare):
    inputs = Manifest.read(compare(layers=[0], names=["small"], sizes=False)).inputs
    assert inputs.keys() == {
        "dictionaries/tiny.reviews/layer0/small",
        "dictionaries/tiny.ppo.reviews/layer0/small",
        "activations/tiny.reviews/mlp",
        "activations/tiny.ppo.reviews/mlp",
    }


# --- what changed ------------------------------------------------------------------------------------------------


def changed_rows(role, tokens):
    """Rows of a latent per channel, each on a fifth of the rows; the tuned model removes the first and doubles the second."""
    writes_FD = np.eye(CHANNELS)
    if role == "tuned":
        writes_FD[0], writes_FD[1] = 0, 2 * writes_FD[1]
    return (np.random.default_rng(0).random((len(tokens.token), CHANNELS)) < 0.2) @ writes_FD


def compare_changed(folder, seeds=(0, 1), tuned_tokens=None, channels=CHANNELS):
    """Folder of a comparison of dictionaries that read the channels of a base and of a changed model."""
    tokens = {"base": tokens_of(random_documents([100] * 64))}
    tokens["tuned"] = tuned_tokens or tokens["base"]
    stores, dictionaries = {}, {}
    for role in ("base", "tuned"):
        stores[role] = write_store(folder / "activations" / role, tokens[role], {0: changed_rows(role, tokens[role])})
        own = {seed: dictionary(np.eye(channels), bias=-0.1) for seed in seeds}
        dictionaries[role, 0, "small"] = write_dictionaries(folder / "dictionaries" / role, own)
    build_comparison({"dictionaries": ["small"], "sizes": None}, folder / "comparison", None, dictionaries, stores)
    return folder / "comparison"


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Folder of a comparison with a removed and a doubled latent; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return compare_changed(tmp_path_factory.mktemp("changed"))


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


def test_with_one_seed_nothing_is_said_of_replication(tmp_path):
    out = compare_changed(tmp_path, seeds=(0,))
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


def test_matched_latents_are_compared_on_the_held_out_rows(full):
    table = pd.read_parquet(full / "latents.parquet")
    held_out = np.repeat(tokens_of(random_documents([10] * 24)).held_out, 10)
    codes = {}
    for number, role in enumerate(("base", "tuned")):
        acts = np.random.default_rng(number).normal(size=(240, CHANNELS)).astype(np.float32)
        codes[role] = members(role, "small", [0])[0].encode(torch.from_numpy(acts[held_out])).numpy()
    pairs = table.query("role == 'base' and layer == 0 and dictionary == 'small' and seed == 0 and match_latent >= 0")
    for row in pairs.itertuples():
        base, tuned = codes["base"][:, row.latent], codes["tuned"][:, row.match_latent]
        both, one = ((base > 0) & (tuned > 0)).sum(), ((base > 0) | (tuned > 0)).sum()
        assert row.match_jaccard == pytest.approx(both / one)
        assert row.match_pearson == pytest.approx(np.corrcoef(base, tuned)[0, 1], abs=1e-5)
        assert row.density_shift == pytest.approx(np.log10((tuned > 0).mean() / (base > 0).mean()))


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
    moments = np.cov(latents_NF.T, bias=True), latents_NF.mean(0), *(latents_NF.T @ acts_ND / 500 for acts_ND in models)
    found_F = scale_error(*(torch.from_numpy(value) for value in (*moments, W_dec_FD, b_dec_D)))
    np.testing.assert_allclose(found_F, betas_MF[1] / betas_MF[0])


def test_stores_of_other_tokens_than_each_other_are_refused(tmp_path):
    other = tokens_of(random_documents([100] * 64, seed=1))
    with pytest.raises(RlsaeError, match=r"tuned/store/activations.zarr holds other tokens than .*; dump both policies"):
        compare_changed(tmp_path, tuned_tokens=other)


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


def test_a_dictionary_of_another_width_than_the_rows_is_refused(tmp_path):
    with pytest.raises(RlsaeError, match=r"seed0 reads rows of 5 channels, layer 0 of .* has 8; compare dictionaries"):
        compare_changed(tmp_path, channels=5)
