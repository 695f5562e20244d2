"""Probes: what is planted is found, what is not there is not, and no word is on both sides of a split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from small_models import perturbed

from rlsae.config.probes import Probes
from rlsae.errors import RlsaeError
from rlsae.interpretation.probes import probe as module
from rlsae.interpretation.probes import ridge
from rlsae.interpretation.probes.components import principal_components
from rlsae.interpretation.probes.overlap import lift
from rlsae.interpretation.probes.probe import COLUMNS, PREDICTIONS, distances, exchanges, logistic_probes, ridge_probes, stem
from rlsae.interpretation.probes.scores import Groups, auc, kendall_tau, permuted_p, r_squared, share
from rlsae.interpretation.probes.tables import build_probes
from rlsae.rewards import vader_lexicon
from rlsae.sae.dictionary import SparseAutoencoder

TRIPLES, WORDS = 120, 40


def letters(number):
    """A word without an ending, other for every number."""
    return "".join("bcdfghjklm"[int(digit)] for digit in f"{number:04d}") + "ock"


def planted(noise=0.05, features=20, seed=0):
    """Triples and features [3N, F] of which one direction is the polarity."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(1, 4, (2, WORDS))
    drawn = np.array([rng.integers(WORDS, size=TRIPLES), rng.integers(WORDS, size=TRIPLES)])
    table = pd.DataFrame(
        {
            "triple": range(TRIPLES),
            "positive": [letters(n) for n in drawn[0]],
            "negative": [letters(n + 5000) for n in drawn[1]],
            "polarity_positive": size[0, drawn[0]],
            "polarity_negative": -size[1, drawn[1]],
        }
    )
    polarity = np.stack([table.polarity_positive, table.polarity_negative, np.zeros(TRIPLES)], 1).ravel()
    rows = polarity[:, None] * rng.normal(size=features) + noise * rng.normal(size=(len(polarity), features))
    return table, rows


def value(table, metric="tau", features="tuned_sae", target="lexicon"):
    return table[(table.metric == metric) & (table.features == features) & (table.target == target)].iloc[0]


@pytest.fixture(scope="module")
def found():
    table, rows = planted()
    noise = np.random.default_rng(9).normal(size=rows.shape)
    return ridge_probes({"tuned_sae": rows, "bag_of_words": noise}, table)


def test_features_that_determine_the_polarity_give_a_tau_near_one(found):
    table, predictions = found
    assert list(table) == COLUMNS
    assert list(predictions) == PREDICTIONS
    tau = value(table)
    assert tau.value > 0.9
    assert tau.ci_low > 0.8
    assert tau.p == pytest.approx(1 / 200)
    assert value(table, "r2").value > 0.95
    assert value(table, "sign_accuracy_positive").value == value(table, "sign_accuracy_negative").value == 1
    assert value(table, "tau_negative").value > 0.8
    assert set(table.status) == {"scored"}


def test_shuffled_labels_and_noise_give_intervals_around_zero_and_no_small_p(found):
    for name in ("shuffled", "bag_of_words"):
        tau = value(found[0], features=name)
        assert tau.ci_low < 0 < tau.ci_high
        assert tau.p > 0.05


def test_the_gain_over_a_baseline_is_stated_with_an_interval(found):
    gain = value(found[0], "tau_difference", "tuned_sae - bag_of_words")
    assert gain.value == pytest.approx(value(found[0]).value - value(found[0], features="bag_of_words").value)
    assert 0 < gain.ci_low < gain.value < gain.ci_high


def test_every_row_is_predicted_once_and_the_scores_are_those_of_the_predictions(found):
    table, predictions = found
    mine = predictions.query("features == 'tuned_sae' and target == 'lexicon'")
    assert sorted(mine.row) == list(range(2 * TRIPLES))
    assert value(table).value == pytest.approx(kendalltau(mine.prediction, mine.polarity).statistic)
    assert value(table, "r2").value == pytest.approx(r2_score(mine.polarity, mine.prediction))


def test_the_paper_s_target_is_a_signed_distance_and_is_scored_against_the_lexicon_too(found):
    rows = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    assert distances(rows).tolist() == [5.0, -1.0]
    assert value(found[0], target="distance").value > 0.8


def test_no_word_and_no_context_is_on_both_sides_of_a_split():
    rng = np.random.default_rng(0)
    names, blocks = [letters(n) for n in rng.integers(30, size=200)], np.arange(200) // 2
    tested = []
    for train, test in ridge.folds(names, blocks, seed=0):
        assert not {names[row] for row in train} & {names[row] for row in test}
        assert not set(blocks[train]) & set(blocks[test])
        tested += test.tolist()
    assert sorted(tested) == list(range(200))


def test_inflections_of_a_word_are_one_group():
    assert len({stem(word) for word in ("love", "Loved", "lovely", "loving", "loves", "lover")}) == 1
    assert stem("horrible") == stem("horribly")
    assert stem("hopeless") != stem("horrible")
    assert stem("stopped") == stem("stops")


def test_predictions_are_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(ridge, "ALPHAS", (0.3,))
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(2, 3, (60, 7)), rng.normal(size=(60, 2))
    names, blocks = [letters(n) for n in range(60)], np.arange(60)
    predicted = ridge.held_out_predictions(rows, labels, names, blocks)
    for train, test in ridge.folds(names, blocks, 0):
        scaler = StandardScaler().fit(rows[train])
        fitted = Ridge(alpha=0.3 * rows.shape[1], fit_intercept=False).fit(scaler.transform(rows[train]), labels[train])
        np.testing.assert_allclose(predicted[test], fitted.predict(scaler.transform(rows[test])), atol=1e-8)


def test_p_is_about_uniform_on_noise(monkeypatch):
    monkeypatch.setattr(module, "PERMUTATIONS", 39)
    monkeypatch.setattr(module, "TARGETS", ("lexicon",))
    ps = []
    for seed in range(24):
        noise = np.random.default_rng(seed + 100).normal(size=(120, 5))
        found, _ = ridge_probes({"tuned_raw": noise}, planted(seed=seed)[0].head(40), seed)
        ps.append(value(found, features="tuned_raw").p)
    assert 0.3 < np.mean(ps) < 0.7
    assert np.mean(np.array(ps) <= 0.1) < 0.3


def test_words_exchange_labels_as_a_whole():
    names = ["a", "b", "a", "c"]
    for row in exchanges(names, 20):
        assert row[0] == row[2] or {row[0], row[2]} == {0, 2}


def test_too_few_words_and_equal_labels_are_rows_with_a_status():
    table, rows = planted()
    few, predictions = ridge_probes({"tuned_sae": rows[:9]}, table.head(3))
    assert few.status.tolist() == ["3 triples with 6 different words; a probe needs 10"]
    assert np.isnan(few.value).all()
    assert predictions.empty
    equal, _ = ridge_probes({"tuned_sae": rows}, table.assign(polarity_positive=1.0, polarity_negative=1.0))
    assert value(equal).status == "all labels are equal"
    assert value(equal, target="distance").status == "predictions or labels are all equal"


def test_triples_that_share_a_word_leave_no_other_words_to_train_on():
    table, rows = planted()
    found, predictions = ridge_probes({"tuned_sae": rows}, table.assign(positive="good", polarity_positive=2.0))
    assert found.status.str.startswith("a few words stand in nearly all triples").tolist() == [True]
    assert predictions.empty


def test_a_fold_within_a_training_fold_may_leave_nothing_to_train_on():
    """One word stands in half of the triples, another one in the others: without the first's, all share the second."""
    hubs = ["good", "nice"] * 12
    names = [name for n, hub in enumerate(hubs) for name in (hub, letters(n))]
    blocks = np.arange(len(names)) // 2
    left = [{names[row] for row in train} & set(hubs) for train, _ in ridge.folds(names, blocks, seed=2)]
    assert {"good"} in left
    assert {"nice"} in left
    rows = np.random.default_rng(0).normal(size=(len(names), 3))
    predicted = ridge.held_out_predictions(rows, 3 * rows[:, :1], names, blocks, seed=2)
    assert np.corrcoef(predicted[:, 0], rows[:, 0])[0, 1] > 0.9


def test_bootstrap_scores_are_those_of_the_resampled_rows():
    rng = np.random.default_rng(0)
    x, y = rng.integers(8, size=50).astype(float), rng.integers(5, size=50).astype(float)
    units = Groups.of(rng.integers(12, size=50).tolist())
    estimates = {"tau": kendall_tau(x, y, units), "r2": r_squared(x, y, units), "auc": auc(x, y > 2, units)}
    shares = share(x > y, units)
    for resample in range(5):
        copies = np.repeat(np.arange(50), units.weights_RG[resample + 1][units.number_N].astype(int))
        a, b = x[copies], y[copies]
        assert estimates["tau"].resampled_R[resample] == pytest.approx(kendalltau(a, b).statistic)
        assert estimates["r2"].resampled_R[resample] == pytest.approx(r2_score(b, a))
        assert estimates["auc"].resampled_R[resample] == pytest.approx(roc_auc_score(b > 2, a))
        assert shares.resampled_R[resample] == pytest.approx((a > b).mean())
    assert permuted_p(1.0, np.array([0.0, 1.0, 2.0])) == 0.75


def test_a_logistic_probe_tells_chosen_from_rejected_where_the_features_do():
    rng = np.random.default_rng(0)
    prompts = [letters(n) for n in range(80)]
    signal = np.tile([1.0, -1.0], 80)[:, None] + rng.normal(size=(160, 6))
    found = logistic_probes({"tuned_sae": signal, "bag_of_words": rng.normal(size=(160, 6))}, prompts).set_index("features")
    accuracy, table = found[found.metric == "accuracy"], found[found.metric != "accuracy"]
    assert accuracy.value["tuned_sae"] > 0.85
    assert accuracy.ci_low["bag_of_words"] < 0.5 < accuracy.ci_high["bag_of_words"]
    assert table.value["tuned_sae"] > 0.9
    assert table.ci_low["tuned_sae"] > 0.85
    assert table.p["tuned_sae"] == 0.001
    assert table.ci_low["bag_of_words"] < 0.5 < table.ci_high["bag_of_words"]
    assert table.p["bag_of_words"] > 0.01
    assert table.ci_low["tuned_sae - bag_of_words"] > 0
    assert abs(table.value["shuffled"] - 0.5) < 0.2


def test_the_first_component_is_the_direction_in_which_features_vary_most():
    rng = np.random.default_rng(0)
    signal = np.tile([1.0, -1.0], 80)[:, None] * np.array([[3.0, 4.0, 0.0]]) + 0.1 * rng.normal(size=(160, 3))
    found = principal_components(signal)
    assert abs(found.groupby("chosen")["first"].mean()).tolist() == pytest.approx([5, 5], abs=0.1)
    assert 0.99 < found.share_first[0] < 1
    assert principal_components(np.ones((8, 3))).empty
    assert principal_components(signal[:2]).empty


def test_too_few_prompts_are_a_row_with_a_status():
    (row,) = logistic_probes({}, ["one"] * 30).to_dict("records")
    assert row["status"] == "1 different prompts; a probe needs 10"


def test_tagged_latents_that_follow_the_reward_have_a_lift_and_others_have_none():
    rng = np.random.default_rng(0)
    predictions, tagged = rng.normal(size=400), np.arange(100) < 10
    active = rng.random((400, 100)) < 0.1
    nothing = lift(predictions, active, tagged)
    assert nothing["lift_high"] == pytest.approx(1, abs=0.3)
    assert nothing["ci_low"] < 1 < nothing["ci_high"]
    assert nothing["p"] > 0.05
    active[:, tagged] |= (predictions > 0.5)[:, None] & (rng.random((400, 10)) < 0.3)
    found = lift(predictions, active, tagged)
    assert found["lift_high"] == pytest.approx(
        active[predictions > 0.69][:, tagged].mean() / active[predictions > 0.69].mean(), rel=0.1
    )
    assert found["lift_high"] > 2 > 1.5 > found["lift_low"]
    assert found["ci_low"] > 2
    assert found["p"] == 1 / 2000
    assert found["p_fisher"] < 1e-6


def test_a_lift_without_tagged_latents_says_so():
    assert lift(np.arange(8.0), np.ones((8, 4), bool), np.zeros(4, bool))["status"] == "no latent is tagged"
    assert lift(np.ones(8), np.ones((8, 4), bool), np.arange(4) < 1)["status"] == "all rewards are equal"


def tables(corpus, tokenizer, random_model, **options):
    base = random_model("gpt_neox")
    W_FD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder(W_FD.T.contiguous(), torch.zeros(40), W_FD, torch.zeros(32))
    models = {"base": base, "tuned": perturbed(base, 1), "saes": {("base", 1): sae, ("tuned", 1): sae}}
    options = {"polarity": vader_lexicon(), "entry": Probes(triples=60)} | options
    return build_probes(options.pop("entry"), corpus=corpus, tokenizer=tokenizer, hook="mlp", **models, **options)


def test_a_corpus_of_documents_has_triples_ridge_probes_and_an_overlap(corpus, tokenizer, random_model):
    found = tables(corpus, tokenizer, random_model, tagged={1: np.arange(40) < 5})
    assert found.metrics["probe_triples"] == len(found.triples) > 20
    assert set(found.probes.probe) == {"ridge"}
    if found.metrics["probe_tau"] is not None:
        low, high = found.metrics["probe_tau_ci95"]
        assert low <= found.metrics["probe_tau"] <= high
        assert found.overlap["by"].tolist() == ["probe", "lexicon"]


def test_a_corpus_of_pairs_has_logistic_probes_too(pairs, tokenizer, random_model):
    found = tables(pairs, tokenizer, random_model)
    assert {"ridge", "logistic"} == set(found.probes.probe)
    assert found.components.chosen.tolist() == [True, False] * (len(found.components) // 2)


def test_a_corpus_without_words_of_the_lexicon_is_a_row_and_a_bad_file_an_error(corpus, tokenizer, random_model, tmp_path):
    found = tables(corpus, tokenizer, random_model, polarity={"unheard": 1.0, "unseen": -1.0})
    assert found.probes.status.tolist() == ["0 triples with 0 different words; a probe needs 10"]
    assert found.metrics["probe_tau"] is None
    assert found.triples.empty
    (tmp_path / "bad.jsonl").write_text("no\n")
    with pytest.raises(RlsaeError, match=r"bad\.jsonl, line 1"):
        tables(corpus, tokenizer, random_model, file=tmp_path / "bad.jsonl")
