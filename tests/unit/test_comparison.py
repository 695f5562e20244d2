"""Latents of base and tuned side by side: similarities, and the table of latents."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_dictionaries, write_store
from small_comparisons import CHANNELS, dictionary, directions, write_policies

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.comparison.matching import percentile
from rlsae.comparison.members import measure
from rlsae.comparison.stage import build_comparison
from rlsae.errors import RlsaeError

CPU = torch.device("cpu")
LATENTS = {"small": 6, "big": 10}
KEY = ["role", "layer", "dictionary", "seed", "latent"]
ACTIVITY = ["firings", "density", "mean_active", "max_active"]
CHANGES = "own write_change write_change_raw write_ratio write_angle p q tag replicated".split()
MATCHES = "match_latent match_cosine_decoder match_cosine_encoder match_jaccard match_pearson".split()
SIZE_MATCHES = ["match_size_latent", "match_size_cosine"]
DESCRIPTION = ["floor_percentile", "scale_error", "density_shift", "norm_ratio", "part_cosine", "model_step_cosine"]
DEAD = 2
"""A latent of every dictionary that never fires."""
PARTNERLESS = -1
SIZES = [f"mmcs_small_big_{role}{ending}" for role in ("base", "tuned") for ending in ("", "_max")]
SCORES = [
    f"{score}_{role}_{where}_{policy}"
    for score, where in [("fvu", "on"), ("ce_recovered", "in"), ("kl_recovered", "in")]
    for role, policy in itertools.product(["base", "tuned"], repeat=2)
]
"""Of the dictionaries of a role with the policy of another."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


# --- what latents do ---------------------------------------------------------------------------------------------


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


def build(results, policies, names=("small", "big"), sizes=True, seeds=None, layers=(0, 3), make=members):
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
    build_comparison(settings, out, None, dictionaries, stores, **policies)
    return out


@pytest.fixture(scope="module")
def policies(tokenizer, tmp_path_factory):
    return write_policies(tmp_path_factory.mktemp("policies"), tokenizer)


@pytest.fixture
def compare(tmp_path, policies):
    """Function of changes: folder of a comparison that is made with them."""
    return lambda **changes: build(tmp_path / "results", policies, **changes)


@pytest.fixture(scope="module")
def full(tmp_path_factory, policies):
    """Folder of the comparison without changes; not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return build(tmp_path_factory.mktemp("comparison") / "results", policies)


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
        groups = [("small→big", entry["sizes"], SIZES)]
        names = ["mmcs_base_tuned", "mmcs_base_tuned_other_seed", "mmcs_floor", *SCORES]
        groups += [(name, figures, names) for name, figures in entry["dictionaries"].items()]
        for name, figures, measures in groups:
            assert figures.keys() - {"tags"} == {*measures, *(f"{key}_ci95" for key in measures)}
            for key in measures:
                low, high = figures[f"{key}_ci95"]
                assert low <= figures[key] <= high
                assert low < high
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
    assert (pd.read_parquet(out / "latents.parquet").match_size_latent == -1).all()


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
        "tokens/tiny.reviews",
    }


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
