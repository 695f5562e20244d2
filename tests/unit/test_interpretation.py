"""What latents mean: where they fire, which tokens explain them, and how the explanation is scored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import finish, random_documents, tokens_of, write_dictionaries, write_policy, write_store
from small_tunings import entry

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.config import Interpretation
from rlsae.interpretation import examples as examples_module
from rlsae.interpretation.examples import gather, top_windows
from rlsae.interpretation.stage import MIN_COUNT, MIN_HELD_OUT_FIRINGS, build_interpretation, detection_auc, select, top_tokens
from rlsae.sae.dictionary import SparseAutoencoder

LENGTHS = [8 + i % 9 for i in range(80)]
TOKENS = tokens_of([20 + ids % 12 for ids in random_documents(LENGTHS)])
HELD_OUT = np.repeat(TOKENS.held_out, np.diff(TOKENS.start))
ROWS = len(TOKENS.token)
A, B, RARE = 21, 22, 300
KEY = ["role", "layer", "dictionary", "seed", "latent"]
SETTINGS = {"latents": 4, "examples": 5, "window": 6, "top_tokens": 8}


def identity(channels):
    """A dictionary whose latent i is the positive part of channel i."""
    eye = torch.eye(channels)
    return SparseAutoencoder(eye, torch.zeros(channels), eye.clone(), torch.zeros(channels))


@pytest.fixture
def planted(tmp_path):
    """Function of channels (one activation per row each) and tokens: evidence on their latents, and their store."""

    def evidence(*channels, tokens=TOKENS):
        acts = np.stack(channels, 1).astype(float)
        store = ActivationStore(write_store(tmp_path / "planted", tokens, {0: acts}))
        return gather(identity(len(channels)), store, 0, np.arange(len(channels))), store

    return evidence


def fires_on(*tokens):
    return np.isin(TOKENS.token, tokens).astype(float)


# --- evidence ----------------------------------------------------------------------------------------------------


def test_only_the_asked_latents_are_encoded_in_the_asked_order(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "ROWS", 100)
    acts = np.random.default_rng(0).normal(size=(ROWS, 4))
    store = ActivationStore(write_store(tmp_path / "a", TOKENS, {0: acts}))
    evidence = gather(identity(4), store, 0, np.array([3, 1]))
    np.testing.assert_array_equal(evidence.row_acts_NS, np.maximum(acts[:, [3, 1]], 0).astype(np.float32))


def test_means_per_token_are_of_training_documents_alone(planted):
    strength = np.random.default_rng(0).uniform(size=ROWS)
    evidence, _ = planted(strength)
    for token in np.unique(TOKENS.token):
        mine = (TOKENS.token == token) & ~HELD_OUT
        assert evidence.token_count_V[token] == mine.sum()
        assert evidence.token_mean_SV[0, token] == pytest.approx(strength[mine].mean(), rel=1e-5)


def test_a_token_that_no_training_document_has_counts_nothing(planted):
    tokens = tokens_of([np.array([5, 6], np.int32), np.array([7], np.int32)], held_out=[False, True])
    evidence, _ = planted(np.ones(3), tokens=tokens)
    assert evidence.token_count_V.tolist() == [0, 0, 0, 0, 0, 1, 1, 0]
    assert evidence.token_mean_SV[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0]


# --- windows -----------------------------------------------------------------------------------------------------


def windows_of(planted, acts, count=10, window=6, tokens=TOKENS):
    _, store = planted(acts, tokens=tokens)
    return top_windows(acts.astype(np.float32), store, count, window)


@pytest.mark.parametrize("window", [1, 6, 16])
def test_a_window_lies_in_one_document_and_holds_the_documents_strongest_row(planted, window):
    acts = np.random.default_rng(0).uniform(size=ROWS)
    found = windows_of(planted, acts, window=window)
    assert len(found) == 10
    for document, first, last, peak in found:
        low, high = TOKENS.start[document], TOKENS.start[document + 1]
        assert low <= first <= peak < last <= high
        assert last - first == min(window, high - low)
        assert acts[peak] == acts[low:high].max()


def test_windows_are_of_the_strongest_documents_in_order_one_each(planted):
    acts = np.random.default_rng(0).uniform(size=ROWS)
    found = windows_of(planted, acts)
    peaks = [acts[low:high].max() for low, high in zip(TOKENS.start[:-1], TOKENS.start[1:], strict=True)]
    assert [document for document, *_ in found] == np.argsort(peaks)[::-1][:10].tolist()


def test_a_document_in_which_a_latent_does_not_fire_is_no_example(planted):
    acts = np.zeros(ROWS)
    acts[[TOKENS.start[7] + 3, TOKENS.start[30]]] = [1, 2]
    assert [document for document, *_ in windows_of(planted, acts)] == [30, 7]


def test_a_document_whose_positions_were_all_dropped_has_no_window(planted):
    documents = random_documents([4, 2, 5, 1, 6])
    tokens = tokens_of(documents, drop_positions=2)  # documents 1 and 3 have no rows
    acts = np.array([1, 2, 9, 3, 3, 8, 1, 1, 4], float)
    found = windows_of(planted, acts, window=2, tokens=tokens)
    assert [(document, peak) for document, _, _, peak in found] == [(2, 2), (4, 5), (0, 1)]


# --- selection ---------------------------------------------------------------------------------------------------


def latents(changes, tagged=(), replicated=()):
    """Write changes of latents, nan for a dead one."""
    numbers = range(len(changes))
    tag = ["dead" if np.isnan(change) else "rotated" if n in tagged else "unchanged" for n, change in enumerate(changes)]
    again = pd.array([n in replicated if n in tagged else None for n in numbers], dtype="boolean")
    return pd.DataFrame({"latent": numbers, "write_change": changes, "tag": tag, "replicated": again})


@pytest.mark.parametrize(
    ("count", "most", "least"),
    [(4, [1, 3], [0, 4]), (3, [1, 3], [0]), (1, [1], []), (5, [1, 3, 2], [0, 4]), (9, [1, 3, 2], [0, 4])],
)
def test_half_of_the_latents_changed_most_and_half_least(count, most, least):
    selected = select(latents([0.1, 0.9, 0.5, 0.7, 0.3]), count)
    groups = {reason: rows.latent.tolist() for reason, rows in selected.groupby("selected_for")}
    assert groups.get("largest of the others", []) == most
    assert groups.get("least changed", []) == least
    assert selected.latent.is_unique


def test_tagged_latents_come_first_and_replicated_ones_before_them():
    selected = select(latents([0.9, 0.5, 0.6, 0.7, 0.2, 0.1], tagged=[1, 2, 3], replicated=[1]), 6)
    assert selected.latent.tolist()[:3] == [1, 3, 2]
    assert selected.selected_for.tolist() == ["changed, replicated", "changed", "changed"] + ["least changed"] * 3


def test_latents_that_could_not_be_tested_are_not_selected():
    table = latents([0.5, 0.6, 0.7, np.nan])
    table.loc[2, "tag"] = "untestable"
    assert set(select(table, 4).latent) == {0, 1}


# --- explanation and score ---------------------------------------------------------------------------------------


def test_a_latent_that_fires_on_exactly_one_token_is_explained_by_it_and_perfectly_detected(planted):
    evidence, store = planted(2.5 * fires_on(A))
    assert top_tokens(evidence, 0, 8) == [A]
    assert detection_auc(evidence, 0, store) == (1.0, "scored")


def test_tokens_are_named_from_the_strongest_on_and_weak_ones_are_left_out(planted):
    evidence, _ = planted(fires_on(A) + 3 * fires_on(B) + 0.01 * fires_on(23, 24))
    assert top_tokens(evidence, 0, 8) == [B, A]
    assert top_tokens(evidence, 0, 1) == [B]


def test_a_token_that_was_seen_too_rarely_is_not_named(planted):
    rows = np.flatnonzero(~HELD_OUT)
    for count, expected in [(MIN_COUNT - 1, [A]), (MIN_COUNT, [RARE, A])]:
        token = TOKENS.token.copy()
        token[rows[:count]] = RARE
        tokens = tokens_of(np.split(token, TOKENS.start[1:-1]))
        evidence, _ = planted((token == A) + 5 * (token == RARE), tokens=tokens)
        assert top_tokens(evidence, 0, 8) == expected


def test_a_latent_that_fires_without_regard_to_the_token_is_hardly_detected(planted):
    fires = np.random.default_rng(0).uniform(size=ROWS) < 0.3
    evidence, store = planted(fires)
    score, status = detection_auc(evidence, 0, store)
    assert status == "scored"
    assert abs(score - 0.5) < 0.15


def test_the_score_is_the_share_of_pairs_of_held_out_rows_that_the_explanation_orders_rightly(planted):
    noise = np.random.default_rng(0).uniform(size=ROWS) < 0.1
    acts = fires_on(A, B) + noise * 2
    evidence, store = planted(acts)
    predicted = evidence.token_mean_SV[0][TOKENS.token[HELD_OUT]]
    fires = acts[HELD_OUT] > 0
    pairs = predicted[fires][:, None] - predicted[~fires][None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert detection_auc(evidence, 0, store)[0] == pytest.approx(expected)


def test_explanations_come_from_training_documents_and_the_score_from_the_others(planted):
    evidence, store = planted(np.where(HELD_OUT, fires_on(B), fires_on(A)))
    assert top_tokens(evidence, 0, 8) == [A]
    score, status = detection_auc(evidence, 0, store)
    assert status == "scored"
    assert score < 0.5


@pytest.mark.parametrize("count", [0, 3, MIN_HELD_OUT_FIRINGS - 1])
def test_a_latent_that_fires_rarely_on_held_out_rows_is_not_scored_and_says_so(planted, count):
    acts = np.where(HELD_OUT, 0, fires_on(A))
    acts[np.flatnonzero(HELD_OUT)[:count]] = 1
    evidence, store = planted(acts)
    score, status = detection_auc(evidence, 0, store)
    assert np.isnan(score)
    assert status == f"fires on {count} of {HELD_OUT.sum()} held-out rows: not scored"


def test_a_latent_that_fires_everywhere_is_not_scored(planted):
    evidence, store = planted(np.ones(ROWS))
    score, status = detection_auc(evidence, 0, store)
    assert np.isnan(score)
    assert status.endswith("not scored")


# --- the stage ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(random_model, tokenizer, corpus, tmp_path_factory):
    """Artifacts of base and tuned, weights of the latter, and the corpus of its prompts."""
    folder = tmp_path_factory.mktemp("policies")
    base = write_policy(folder / "models" / "tiny", random_model("gpt_neox"), tokenizer)
    recipe = {"tuning": entry().settings(), "reward": {"kind": "lexicon"}}
    tuned = write_policy(folder / "policies" / "tiny.ppo", random_model("gpt_neox"), tokenizer)
    finish(tuned, "policies", parameters=recipe)
    return base, tuned, tuned / "model", corpus


CHANNELS = [
    fires_on(A),
    fires_on(B) * 2,
    fires_on(A, B) * 0.5,
    np.random.default_rng(5).uniform(size=ROWS) < 0.2,
]


@pytest.fixture
def interpret(policies, tmp_path):
    """Function of changes: folder of the interpretation of a base with planted latents and of a tuned policy like it."""

    def build(folder="a", channels=CHANNELS, tokens=TOKENS, changes=(0.1, 0.9, 0.5, 0.7), seeds=(0, 1), **settings):
        results = tmp_path / folder / "results"
        acts = np.stack(channels, 1).astype(float)
        stores, dictionaries, rows = {}, {}, []
        for role, policy in [("base", "tiny"), ("tuned", "tiny.ppo")]:
            stores[role] = write_store(results / "activations" / f"{policy}.reviews" / "mlp", tokens, {0: acts})
            path = results / "dictionaries" / f"{policy}.reviews" / "layer0" / "small"
            saes = {seed: identity(len(channels)) for seed in seeds}
            dictionaries[role, 0, "small"] = write_dictionaries(path, saes)
            for seed in seeds:
                key = {"role": role, "layer": 0, "dictionary": "small", "seed": seed}
                rows.append(latents(changes).assign(**key))
        comparison = finish(results / "comparison" / "main", "comparison")
        pd.concat(rows).to_parquet(comparison / "latents.parquet", index=False)
        pd.DataFrame({"layer": [0], "rank": [0]}).to_parquet(comparison / "levels.parquet", index=False)
        out = results / "interpretation" / "main"
        entry = Interpretation(**SETTINGS | settings)
        build_interpretation(entry, out, None, comparison, dictionaries, stores, *policies, None)
        return out

    return build


def test_a_planted_latent_is_explained_by_its_token(interpret, tokenizer):
    table = pd.read_parquet(interpret() / "latents.parquet")
    assert list(table.columns) == [*KEY, "selected_for", "explanation", "detection_auc", "status"]
    for role in ("base", "tuned"):
        mine = table[table.role == role].set_index("latent")
        assert mine.explanation[0] == f"fires on ‹{tokenizer.decode([A])}›"
        named = {f"‹{tokenizer.decode([token])}›" for token in (A, B)}
        assert set(mine.explanation[2].removeprefix("fires on ").split(" ")) == named
        assert mine.detection_auc[[0, 1, 2]].tolist() == [1, 1, 1]
        assert (mine.status == "scored").all()
        most, least = "largest of the others", "least changed"
        assert mine.selected_for.to_dict() == {1: most, 3: most, 0: least, 2: least}


def test_the_first_seed_is_explained_whatever_the_order_of_the_seeds(interpret):
    assert set(pd.read_parquet(interpret(seeds=(11, 3)) / "latents.parquet").seed) == {3}


def test_there_is_an_explanation_per_latent_explainer_and_judge(interpret):
    out = interpret()
    table = pd.read_parquet(out / "explanations.parquet")
    assert set(table.columns) == {*KEY, "explainer", "explanation", "judge", "score", "status"}
    assert not table.duplicated([*KEY, "explainer", "judge"]).any()
    latents = pd.read_parquet(out / "latents.parquet")
    pd.testing.assert_series_equal(table.score, latents.detection_auc, check_names=False)


def test_examples_are_windows_of_tokens_and_activations_with_their_peak(interpret, tokenizer):
    table = pd.read_parquet(interpret() / "examples.parquet")
    assert list(table.columns) == [*KEY, "rank", "document", "held_out", "peak", "tokens", "activations"]
    assert set(table.groupby(KEY).size()) == {5}
    for row in table.itertuples():
        assert len(row.tokens) == len(row.activations) <= 6
        assert row.activations[row.peak] == max(row.activations) > 0
        assert row.held_out == TOKENS.held_out[row.document]
    mine = table[table.latent == 0]
    assert {row.tokens[row.peak] for row in mine.itertuples()} == {tokenizer.decode([A])}
    assert (table.groupby(KEY)["rank"].apply(list).map(lambda ranks: ranks == [0, 1, 2, 3, 4])).all()
    assert not table.duplicated([*KEY, "document"]).any()


def test_the_manifest_counts_explained_latents_and_averages_their_scores(interpret):
    out = interpret()
    manifest, table = Manifest.read(out), pd.read_parquet(out / "latents.parquet")
    assert manifest.metrics["latents_explained"] == 8
    assert manifest.metrics["detection_auc"] == pytest.approx(table.detection_auc.mean())
    assert {"comparison/main", "activations/tiny.reviews/mlp", "dictionaries/tiny.ppo.reviews/layer0/small"} <= set(
        manifest.inputs
    )


def test_fewer_latents_are_explained_where_fewer_are_asked_for(interpret):
    table = pd.read_parquet(interpret(latents=2) / "latents.parquet")
    assert table.groupby("role").latent.apply(list).to_dict() == {"base": [1, 0], "tuned": [1, 0]}


def test_a_latent_without_an_explanation_has_a_row_with_its_reason_and_no_score(interpret):
    # The latent fires on twenty tokens that training documents hold once each: too rarely to be named.
    token = TOKENS.token.copy()
    for rows in (np.flatnonzero(HELD_OUT), np.flatnonzero(~HELD_OUT)):
        token[rows[:20]] = RARE + np.arange(20) % 20
    tokens = tokens_of(np.split(token, TOKENS.start[1:-1]))
    channels = [token >= RARE, token == A]
    table = pd.read_parquet(interpret(channels=channels, tokens=tokens, changes=(0.9, 0.1)) / "latents.parquet")
    rare = table[(table.role == "base") & (table.latent == 0)].iloc[0]
    assert rare.explanation == ""
    assert rare.status == "no token fires it often enough"
    assert np.isnan(rare.detection_auc)


def test_a_study_whose_latents_are_all_dead_has_tables_without_rows(interpret):
    dead = [np.zeros(ROWS), np.zeros(ROWS)]
    out = interpret(channels=dead, changes=(np.nan, np.nan))
    metrics = {"latents_explained": 0, "detection_auc": None}
    assert Manifest.read(out).metrics == metrics | {"ablation_reward_change": None, "ablation_random_quantile": None}
    assert len(pd.read_parquet(out / "latents.parquet")) == 0
    assert [*KEY, "rank"] == list(pd.read_parquet(out / "examples.parquet").columns)[:6]


def test_equal_interpretations_give_equal_bytes(interpret):
    assert (interpret("a") / MANIFEST).read_bytes() == (interpret("b") / MANIFEST).read_bytes()
