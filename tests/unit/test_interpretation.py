"""The stage of the interpretation: which latents are explained, with which windows, and what its tables hold."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import finish, random_documents, read_json, tokens_of, write_dictionaries, write_policy, write_store
from small_llm_server import examples, served
from small_tunings import entry

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.comparison.kinds import KEY
from rlsae.config import InterpretationJob
from rlsae.errors import RlsaeError
from rlsae.interpretation import examples as examples_module
from rlsae.interpretation.examples import row_acts, top_windows
from rlsae.interpretation.interventions import ablation, steering, transplant
from rlsae.interpretation.selection import select
from rlsae.interpretation.stage import EXAMPLE_COLUMNS, LATENT_COLUMNS, Files, build_interpretation
from rlsae.sae.dictionary import SparseAutoencoder

LENGTHS = [8 + i % 9 for i in range(80)]
TOKENS = tokens_of([20 + ids % 12 for ids in random_documents(LENGTHS)])
HELD_OUT = np.repeat(TOKENS.held_out, np.diff(TOKENS.start))
ROWS = len(TOKENS.token)
A, B, RARE = 21, 22, 300
SETTINGS = {"latents": 4, "examples": 5, "window": 6, "interventions": None, "probes": None}


WIDTH = 32
"""Of the model."""


def identity(latents, channels=None):
    """A dictionary whose latent i is the positive part of channel i."""
    eye = torch.eye(latents, channels or latents)
    return SparseAutoencoder(eye.T.contiguous(), torch.zeros(latents), eye, torch.zeros(channels or latents))


@pytest.fixture
def planted(tmp_path):
    """Function of a channel (an activation per row) and tokens: their store."""
    return lambda acts, tokens=TOKENS: ActivationStore(write_store(tmp_path / "planted", tokens, {0: acts[:, None]}))


def fires_on(*tokens):
    return np.isin(TOKENS.token, tokens).astype(float)


# --- windows -----------------------------------------------------------------------------------------------------


def test_only_the_asked_latents_are_encoded_in_the_asked_order(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "ROWS", 100)
    acts = np.random.default_rng(0).normal(size=(ROWS, 4))
    store = ActivationStore(write_store(tmp_path / "a", TOKENS, {0: acts}))
    found_NS = row_acts(identity(4), store, 0, np.array([3, 1]), torch.device("cpu"))
    np.testing.assert_array_equal(found_NS, np.maximum(acts[:, [3, 1]], 0).astype(np.float32))


def windows_of(planted, acts, count=10, window=6, tokens=TOKENS):
    return top_windows(acts.astype(np.float32), planted(acts, tokens), count, window)


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


def latents(changes, tagged=(), replicated=(), **links):
    """Write changes of latents, nan for a dead one, and their links to the reward."""
    numbers = range(len(changes))
    tag = ["dead" if np.isnan(change) else "rotated" if n in tagged else "unchanged" for n, change in enumerate(changes)]
    again = pd.array([n in replicated if n in tagged else None for n in numbers], dtype="boolean")
    return pd.DataFrame({"latent": numbers, "write_change": changes, "tag": tag, "replicated": again, "density": 0.1, **links})


def linked(changes, correlation=np.nan, gradient=np.nan, **given):
    return latents(changes, reward_correlation=correlation, reward_gradient=gradient, **given)


def reasons(selected):
    return {reason: rows.latent.tolist() for reason, rows in selected.groupby("selected_for", sort=False)}


def test_half_changed_most_a_quarter_go_with_the_reward_and_a_quarter_changed_least():
    table = linked([0.1, 0.9, 0.5, 0.7, 0.3, 0.2], gradient=[0.5, 0.1, -0.9, 0.2, 0.3, 0])
    assert reasons(select(table, 4)) == {
        "largest of the others": [1, 3],
        "goes with the reward": [2],
        "least changed": [0],
    }


def test_the_gradient_of_the_reward_goes_before_the_correlation_where_it_is_known():
    correlation = [0, 0, 0, 0, 0.9, 0]
    table = linked([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], correlation)
    assert reasons(select(table, 4))["goes with the reward"] == [4]
    table["reward_gradient"] = [0, 0, 0, 2.0, 0, 0]
    assert reasons(select(table, 4))["goes with the reward"] == [3]


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_as_many_are_selected_as_are_asked_for_or_are_there(count):
    selected = select(linked([0.1, 0.9, 0.5, 0.7, 0.3]), count)
    assert len(selected) == min(count, 5)
    assert selected.latent.is_unique


def test_tagged_latents_come_first_and_replicated_ones_before_them():
    selected = select(linked([0.9, 0.5, 0.6, 0.7, 0.2, 0.1], tagged=[1, 2, 3], replicated=[1]), 6)
    assert selected.latent.tolist()[:3] == [1, 3, 2]
    assert selected.selected_for.tolist()[:3] == ["changed, replicated", "changed", "changed"]


def test_latents_that_could_not_be_tested_are_selected_only_if_they_are_listed():
    table = linked([0.5, 0.6, 0.7, np.nan])
    table.loc[2, "tag"] = "untestable"
    assert set(select(table, 4).latent) == {0, 1}
    assert reasons(select(table, 1, listed=[2, 3])) == {"listed": [2, 3]} | {"least changed": [0]}


def test_a_listed_latent_that_the_dictionary_does_not_have_is_refused():
    with pytest.raises(RlsaeError, match=r"interpretation\.listed: latent 7; this dictionary has latents 0 to 2"):
        select(linked([0.1, 0.2, 0.3]), 2, listed=[7])


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
        for made in ("activations", "dictionaries"):
            shutil.rmtree(results / made, ignore_errors=True)
        acts = np.random.default_rng(1).normal(size=(len(tokens.token), WIDTH)) * 0.1
        acts[:, : len(channels)] = np.stack(channels, 1)
        stores, dictionaries, rows = {}, {}, []
        for role, policy in [("base", "tiny"), ("tuned", "tiny.ppo")]:
            stores[role] = write_store(results / "activations" / f"{policy}.reviews" / "mlp", tokens, {0: acts})
            path = results / "dictionaries" / f"{policy}.reviews" / "layer0" / "small"
            saes = {seed: identity(len(channels), WIDTH) for seed in seeds}
            dictionaries[role, 0, "small"] = write_dictionaries(path, saes)
            for seed in seeds:
                key = {"role": role, "layer": 0, "dictionary": "small", "seed": seed}
                rows.append(latents(changes).assign(**key))
        comparison = finish(results / "comparison" / "main", "comparison")
        pd.concat(rows).to_parquet(comparison / "latents.parquet", index=False)
        pd.DataFrame({"layer": [0], "rank": [0]}).to_parquet(comparison / "levels.parquet", index=False)
        out = results / "interpretation" / "main"
        entry = InterpretationJob(**SETTINGS | settings)
        build_interpretation(
            entry, out, None, comparison, dictionaries, stores, *policies, Files(llm_answers=tmp_path / "answers")
        )
        return out

    return build


def test_a_planted_latent_is_explained_by_its_token(interpret, tokenizer):
    table = pd.read_parquet(interpret() / "latents.parquet")
    assert list(table.columns) == [*LATENT_COLUMNS, "ablation_reward_change"]
    for role in ("base", "tuned"):
        mine = table[table.role == role].set_index("latent")
        assert mine.explanation[0].startswith(f"fires on ‹{tokenizer.decode([A])}›")
        assert all(f"‹{tokenizer.decode([token])}›" in mine.explanation[2] for token in (A, B))
        assert (mine.detection_auc[[0, 1, 2]] > 0.95).all()
        assert abs(mine.detection_auc[3] - 0.5) < 0.3
        assert (mine.status == "scored").all()


def test_the_first_seed_is_explained_whatever_the_order_of_the_seeds(interpret):
    assert set(pd.read_parquet(interpret(seeds=(11, 3)) / "latents.parquet").seed) == {3}


def test_there_is_a_score_per_latent_explainer_judge_and_control(interpret):
    out = interpret()
    table = pd.read_parquet(out / "explanations.parquet")
    assert not table.duplicated([*KEY, "explainer", "judge", "control"]).any()
    assert set(table.explainer) == {"tokens", "ngram", "lexicon", "logit_lens", "ensemble"}
    assert set(table.judge) == {"detection", "fuzzing", "simulation", "intruder"}
    assert set(table.control) == {"", "other_latent", "shuffled"}
    assert ((table.status == "scored") == table.score.notna()).all()
    mine = table[(table.explainer == "ensemble") & (table.judge == "detection") & (table.control == "")]
    latents = pd.read_parquet(out / "latents.parquet")
    pd.testing.assert_series_equal(mine.score.reset_index(drop=True), latents.detection_auc, check_names=False)


def test_controls_do_no_better_than_chance(interpret):
    table = pd.read_parquet(interpret() / "explanations.parquet")
    means = table[(table.judge == "detection") & (table.explainer == "tokens")].groupby("control").score.mean()
    assert means[""] > 0.8
    assert means["shuffled"] == pytest.approx(0.5, abs=0.15)
    assert means["other_latent"] < means[""]


def test_examples_show_base_and_tuned_on_the_same_windows(interpret, tokenizer):
    table = pd.read_parquet(interpret() / "examples.parquet")
    assert list(table.columns) == EXAMPLE_COLUMNS
    assert set(table.groupby(KEY).size()) == {5}
    for row in table.itertuples():
        assert len(row.tokens) == len(row.activations) <= 6
        assert row.activations[row.peak] == max(row.activations) > 0
        assert row.held_out == TOKENS.held_out[row.document]
        # Both models have the same rows here.
        np.testing.assert_array_equal(row.activations, row.activations_other)
    mine = table[table.latent == 0]
    assert {row.tokens[row.peak] for row in mine.itertuples()} == {tokenizer.decode([A])}
    assert (table.groupby(KEY)["rank"].apply(list).map(lambda ranks: ranks == [0, 1, 2, 3, 4])).all()
    assert not table.duplicated([*KEY, "document"]).any()


def test_failures_are_windows_that_an_explanation_ranks_wrongly(interpret):
    out = interpret()
    failures = pd.read_parquet(out / "failures.parquet")
    explained = pd.read_parquet(out / "explanations.parquet").query("judge == 'detection' and control == ''")
    keyed = failures.groupby([*KEY, "explainer"]).size()
    assert set(keyed) <= {1, 2}
    perfect = explained[explained.score == 1].set_index([*KEY, "explainer"]).index
    assert not set(keyed.index) & set(perfect)
    for row in failures.to_dict("records"):
        assert (max(row["activations"]) > 0) == (row["failure"] == "missed")
        assert len(row["tokens"]) == len(row["activations"]) == len(row["predictions"])


def test_the_histogram_counts_the_rows_at_which_a_latent_fires(interpret):
    latents = pd.read_parquet(interpret() / "latents.parquet")
    assert all(len(counts) == 30 and sum(counts) for counts in latents.histogram)


def test_every_latent_has_its_link_to_the_reward(interpret):
    table = pd.read_parquet(interpret() / "reward_links.parquet")
    columns = ["reward_correlation", "task_tagged", "task_effect", "task_p", "reward_gradient", "reward_gradient_error"]
    assert list(table.columns) == [*KEY, *columns]
    assert table.groupby("role").latent.apply(list).to_dict() == {"base": [0, 1, 2, 3], "tuned": [0, 1, 2, 3]}


def test_the_manifest_counts_explained_latents_and_averages_their_scores(interpret):
    out = interpret()
    manifest, table = Manifest.read(out), pd.read_parquet(out / "latents.parquet")
    assert manifest.metrics["latents_explained"] == 8
    assert manifest.metrics["detection_auc"] == pytest.approx(table.detection_auc.mean())
    assert {"comparison/main", "activations/tiny.reviews/mlp", "dictionaries/tiny.ppo.reviews/layer0/small"} <= set(
        manifest.inputs
    )
    summary = read_json(out / "summary.json")
    assert {key: summary[key] for key in manifest.metrics} == manifest.metrics
    assert summary["scores"]["ensemble detection"]["mean"] == pytest.approx(table.detection_auc.mean())


def test_listed_latents_are_explained_besides(interpret):
    table = pd.read_parquet(interpret(latents=1, listed={"0/small": [3]}) / "latents.parquet")
    assert set(table.latent[table.selected_for == "listed"]) == {3}


def test_latents_listed_for_a_dictionary_that_is_not_there_are_refused(interpret):
    with pytest.raises(RlsaeError, match=r"interpretation\.listed: '1/small'; this study has 0/small"):
        interpret(listed={"1/small": [3]})


def test_a_study_whose_latents_are_all_dead_has_tables_without_rows(interpret):
    dead = [np.zeros(ROWS), np.zeros(ROWS)]
    out = interpret(channels=dead, changes=(np.nan, np.nan))
    metrics = Manifest.read(out).metrics
    assert metrics["latents_explained"] == metrics["task_tagged"] == 0
    assert metrics["detection_auc"] is None
    assert len(pd.read_parquet(out / "latents.parquet")) == 0
    assert [*KEY, "rank"] == list(pd.read_parquet(out / "examples.parquet").columns)[:6]


def test_interventions_fill_their_tables(interpret):
    out = interpret(latents=2, interventions={"prompts": 8, "latents": 2, "random_sets": 3, "gains": [0.0, 2.0]})
    ablations, steered, moved = (pd.read_parquet(out / f"{name}.parquet") for name in ("ablations", "steering", "transplants"))
    assert list(ablations.columns) == ablation.COLUMNS
    assert list(steered.columns) == steering.COLUMNS
    assert list(moved.columns) == transplant.COLUMNS
    assert set(moved.level) == {"mean", "map", "latents", "map and latents"}
    explained = pd.read_parquet(out / "latents.parquet")
    assert explained.ablation_reward_change.notna().equals(explained.role == "tuned")
    assert pd.read_parquet(out / "reward_links.parquet").reward_gradient.notna().all()


def test_an_interpretation_that_was_killed_repeats_no_dictionary_that_it_was_done_with(interpret, monkeypatch):
    settings = {"latents": 2, "interventions": {"prompts": 8, "latents": 2, "random_sets": 3, "gains": [0.0, 2.0]}}
    whole, done = interpret("whole", **settings), []

    def ablations(table, policy, *others, original=ablation.ablations):
        done.append(policy)
        return original(table, policy, *others)

    def killed_at_the_second(table, policy, *others):
        if policy == "tuned":
            raise KeyboardInterrupt
        return ablations(table, policy, *others)

    monkeypatch.setattr(ablation, "ablations", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        interpret("killed", **settings)
    monkeypatch.setattr(ablation, "ablations", ablations)
    resumed = interpret("killed", **settings)
    assert done == ["base", "tuned"]
    assert (resumed / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


def test_a_language_model_explains_judges_and_is_asked_about_the_task(interpret, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-0123456789")

    def reader(asked):
        if "related to" in asked:
            return "1"
        return json.dumps([1] * len(examples(asked))) if examples(asked) else "It fires on a letter."

    with served(reader) as server:
        llm = {"kind": "openai", "base_url": server.url, "model": "small", "key_variable": "A_KEY"}
        out = interpret(latents=2, llm=llm)
        asked = len(server.requests)
        again = interpret("b", latents=2, llm=llm)
        assert len(server.requests) == asked > 0
    assert (out / MANIFEST).read_bytes() == (again / MANIFEST).read_bytes()
    table = pd.read_parquet(out / "explanations.parquet")
    said = table[(table.explainer == "llm") & (table.control == "")]
    assert set(said.explanation) == {"It fires on a letter."}
    assert said.score[said.judge == "llm_detection"].tolist() == pytest.approx([0.5] * 4)  # says yes to everything
    assert set(pd.read_parquet(out / "latents.parquet").llm_task_related) == {"1"}
    files = [path for path in out.parents[3].rglob("*") if path.is_file()]
    assert any("answers" in path.parts for path in files)
    assert not any(b"sk-secret" in path.read_bytes() for path in files)


def test_without_its_server_a_study_is_explained_as_far_as_it_can_be(interpret, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-0123456789")
    llm = {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "small", "key_variable": "A_KEY", "retries": 0}
    table = pd.read_parquet(interpret(latents=2, llm=llm) / "explanations.parquet")
    of_llm = (table.explainer == "llm") & (table.control == "")
    assert table.status[of_llm].str.contains("cannot be reached|not asked").all()
    assert (
        table.status[(table.explainer == "tokens") & (table.judge == "detection") & (table.control == "")] == "scored"
    ).all()


def test_equal_interpretations_give_equal_bytes(interpret):
    assert (interpret("a") / MANIFEST).read_bytes() == (interpret("b") / MANIFEST).read_bytes()
