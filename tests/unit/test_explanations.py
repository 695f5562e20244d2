"""Explainers and judges on latents of known meaning: a word, a pair of words, an ending, a polarity, nothing at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_artifacts import tokens_of, write_store

from rlsae.activations.store import ActivationStore
from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.explain import Text, evidence_of, explain
from rlsae.interpretation.explainers import lexicon, logit_lens, ngram, tokens
from rlsae.interpretation.explainers.ensemble import combine
from rlsae.interpretation.explanation import Explanation
from rlsae.interpretation.judges import JUDGES, MIN_WINDOWS, judged, ranking_auc
from rlsae.interpretation.positions import Vocabulary
from rlsae.interpretation.windows import Window, draw, fired_at

STEMS = ["walk", "talk", "jump", "look", "play", "turn", "call", "need"]
WORDS = [" good", " bad", " not", " the", " of", " Anna", " 7", " ,", " superb", " awful"]
WORDS += [f" {stem}{ending}" for stem in STEMS for ending in ("", "ing", "ed", "s")]
POLARITY = {"good": 2.0, "bad": -2.0, "superb": 3.0, "awful": -3.0}
NUMBER = {word.strip(): number for number, word in enumerate(WORDS)}
RNG = np.random.default_rng(0)
OFTEN = np.where(np.isin(WORDS, [" good", " not"]), 3.0, 1.0)
TOKENS = tokens_of(
    [RNG.choice(len(WORDS), length, p=OFTEN / OFTEN.sum()).astype(np.int32) for length in RNG.integers(20, 60, 2400)]
)
IDS = TOKENS.token
BEFORE = np.where(np.isin(np.arange(len(IDS)), TOKENS.start[:-1]), -1, np.roll(IDS, 1))
HELD_OUT = np.repeat(TOKENS.held_out, np.diff(TOKENS.start))
COUNT = 300
NO_TOKENS = np.empty(0, np.int64)


class Words:
    """Stands for a tokenizer."""

    def decode(self, ids):
        return "".join(WORDS[number] for number in ids)


def ends_in(*endings):
    return np.isin(IDS, [number for word, number in NUMBER.items() if word.endswith(endings)])


LATENTS = {
    "word": NUMBER["good"] == IDS,
    "bigram": (NUMBER["good"] == IDS) & (NUMBER["not"] == BEFORE),
    "suffix": ends_in("ing"),
    "polarity": 2.0 * (NUMBER["good"] == IDS) + 3.0 * (NUMBER["superb"] == IDS),
    "nothing": np.random.default_rng(1).uniform(size=len(IDS)) < 0.03,
}
LATENTS = {name: acts.astype(np.float32) for name, acts in LATENTS.items()}
RIGHT = {
    "word": "fires on ‹ good›",
    "bigram": "fires on ‹ good› after ‹ not›",
    "suffix": "fires on words ending in ‹ing›",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    store = ActivationStore(write_store(tmp_path_factory.mktemp("s") / "a", TOKENS, {0: np.zeros((len(IDS), 2))}, 8192))
    return Text.of(store, 16, Vocabulary(Words(), len(WORDS), POLARITY))


@pytest.fixture(scope="module")
def evidence(text):
    """Function of activations: what explainers see of them."""
    return lambda acts: evidence_of(text, acts, NO_TOKENS, NO_TOKENS, COUNT, seed=0)


@pytest.fixture(scope="module")
def windows(text):
    """Function of activations: held-out windows in which a latent with these fires, and does not."""
    return lambda acts: text.both_sides(acts, True, COUNT, seed=0)


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_windows_are_of_the_asked_documents_and_fire_or_do_not(text, held_out):
    active, silent = text.both_sides(LATENTS["word"], held_out, 50, seed=0)
    assert len(active) == len(silent) == 50
    assert sorted(len(w.ids) for w in active) == sorted(len(w.ids) for w in silent)
    assert all(window.held_out == held_out for window in active + silent)
    assert all(window.fires for window in active)
    assert not any(window.fires for window in silent)
    for window in active:
        rows = TOKENS.start[window.document] + window.position + np.arange(len(window.ids))
        np.testing.assert_array_equal(window.ids, IDS[rows])
        np.testing.assert_array_equal(window.acts, LATENTS["word"][rows])
        assert window.before == BEFORE[rows[0]]
        assert window.tokens == tuple(WORDS[number] for number in window.ids)


def test_activating_windows_come_from_all_quantiles_not_from_the_strongest_alone(text):
    acts = RNG.exponential(size=len(IDS)).astype(np.float32)
    active, _ = draw(text.cuts, acts, False, 50, NO_TOKENS, seed=0)
    largest = text.cuts.largest(acts)
    edges = np.quantile(largest[~text.cuts.held_out_W], np.linspace(0, 1, 6))
    assert (np.histogram(largest[active], edges)[0] >= 8).all()


def test_half_of_the_silent_windows_are_near_misses(text):
    near = fired_at(text.cuts, LATENTS["bigram"], text.training_N)
    assert near.tolist() == [NUMBER["good"]]
    _, silent = text.both_sides(LATENTS["bigram"], True, 50, seed=0)
    assert sum(NUMBER["good"] in window.ids for window in silent) == pytest.approx(25, abs=4)


def test_the_same_seed_draws_the_same_windows(text):
    first, second = (draw(text.cuts, LATENTS["word"], True, 20, NO_TOKENS, seed=3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


# --- explainers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RIGHT))
def test_ngram_finds_the_rule(evidence, name):
    assert ngram.explain(evidence(LATENTS[name])).text == RIGHT[name]


@pytest.mark.parametrize(
    ("acts", "expected"),
    [
        (NUMBER["not"] == BEFORE, "fires on what follows ‹ not›"),
        (NUMBER["7"] == IDS, "fires on ‹ 7›"),
        (np.isin(np.arange(len(IDS)), TOKENS.start[:-1]), "fires on what follows the start"),
        (np.isin(np.arange(len(IDS)), TOKENS.start[:-1] + 1), "fires on token 2 of a document"),
        (ends_in("ing", "ed"), "fires on words ending in ‹ed›; words ending in ‹ing›"),
    ],
)
def test_ngram_knows_contexts_places_and_unions(evidence, acts, expected):
    assert ngram.explain(evidence(acts.astype(np.float32))).text == expected


def test_ngram_predicts_the_mean_activation_of_the_first_rule_that_holds(evidence, windows):
    explanation = ngram.explain(evidence(LATENTS["polarity"]))
    for window in itertools.chain(*windows(LATENTS["polarity"])):
        np.testing.assert_allclose(explanation.predict(window), window.acts)


def test_tokens_are_named_from_the_strongest_on_and_weak_ones_are_left_out(evidence):
    weak = (NUMBER["the"] == IDS) * 0.01
    explanation = tokens.explain(evidence((LATENTS["polarity"] + weak).astype(np.float32)))
    assert explanation.text == "fires on ‹ superb› ‹ good›"


def test_a_token_that_was_seen_too_rarely_is_not_named(text):
    rows = text.rows
    few = np.flatnonzero(rows.token_N == NUMBER["good"])[: tokens.MIN_COUNT - 1]
    seen = np.zeros(len(rows), bool)
    seen[few] = True
    some = rows[seen | (rows.token_N != NUMBER["good"])]
    acts = (some.token_N == NUMBER["good"]).astype(np.float32)
    evidence = Evidence(some, text.kinds, {}, acts, [], [], NO_TOKENS, NO_TOKENS, text.vocabulary)
    assert tokens.explain(evidence).status == "no token fires it often enough"


def test_the_lexicon_names_the_polarity_of_the_words(evidence, windows):
    explanation = lexicon.explain(evidence(LATENTS["polarity"]))
    assert explanation.text.startswith("fires on positive words: mean polarity +2.")
    assert explanation.text.endswith("100% in the lexicon")
    window = windows(LATENTS["polarity"])[0][0]
    np.testing.assert_array_equal(explanation.predict(window) > 0, window.acts > 0)


@pytest.mark.parametrize("name", ["suffix", "nothing"])
def test_the_lexicon_says_nothing_of_latents_without_polarity(evidence, name):
    explanation = lexicon.explain(evidence(LATENTS[name]))
    assert explanation.text == ""
    assert explanation.status.startswith("no polarity")


def test_the_polarity_test_is_silent_on_noise():
    rng = np.random.default_rng(0)
    fired = rng.poisson(3, size=(200, 400)).astype(float)
    polarity = np.stack([rng.normal(size=400) * np.sqrt(count) for count in fired])
    _, p = lexicon.polarity_test(polarity, fired, 0.0)
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.035)


def test_the_polarity_test_equals_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    fired = rng.poisson(2, size=(300, 1)).astype(float)
    mood = rng.normal(size=(300, 1))  # tokens of a document agree with each other
    summed = fired * (0.3 + mood)
    difference, p = lexicon.polarity_test(summed, fired, 0.0)
    draws = rng.integers(300, size=(4000, 300))
    means = summed[draws, 0].sum(1) / fired[draws, 0].sum(1)
    assert difference[0] == pytest.approx(summed.sum() / fired.sum())
    z = difference[0] / means.std()
    assert p[0] == pytest.approx(2 * (1 - _phi(z)), rel=0.5)


def _phi(z):
    from scipy.stats import norm

    return norm.cdf(z)


def test_the_logit_lens_predicts_the_token_before_one_that_is_raised(evidence, windows):
    acts = (np.roll(IDS, -1) == NUMBER["good"]).astype(np.float32)
    seen = evidence(acts)
    lens = Evidence(**{**vars(seen), "raised": np.array([NUMBER["good"]]), "lowered": np.array([NUMBER["bad"]])})
    explanation = logit_lens.explain(lens)
    assert explanation.text == "raises ‹ good›, lowers ‹ bad›"
    assert judged(JUDGES["detection"], explanation, *windows(acts), 0).value > 0.9


def test_a_latent_that_never_fires_has_no_explanation_and_says_why(evidence):
    said = explain(evidence(np.zeros(len(IDS), np.float32)), {})
    for name in ("tokens", "ngram", "lexicon", "ensemble"):
        assert said[name].text == ""
        assert said[name].status != "explained"


def test_the_ensemble_takes_over_who_predicts_training_windows(evidence):
    seen = evidence(LATENTS["bigram"])
    wrong = Explanation("fires on ‹ 7›", predict=lambda window: (window.ids == NUMBER["7"]).astype(float))
    both = combine({"ngram": ngram.explain(seen), "wrong": wrong}, seen)
    assert both.text == RIGHT["bigram"]


# --- judges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RIGHT))
@pytest.mark.parametrize("explainer", ["ngram", "ensemble"])
def test_the_right_explanation_is_detected(evidence, windows, name, explainer):
    said = explain(evidence(LATENTS[name]), {})[explainer]
    active, silent = windows(LATENTS[name])
    scores = {judge: judged(JUDGES[judge], said, active, silent, 0) for judge in JUDGES}
    assert scores["detection"].value >= 0.95
    assert scores["fuzzing"].value >= 0.95
    assert scores["intruder"].value >= 0.95
    assert scores["simulation"].value >= (0.95 if explainer == "ngram" else 0.85)  # the ensemble hears others too
    assert all(score.low - 1e-9 <= score.value <= score.high + 1e-9 for score in scores.values())


@pytest.mark.parametrize(("name", "other"), [("word", "suffix"), ("suffix", "word"), ("suffix", "bigram")])
def test_a_wrong_explanation_is_no_better_than_chance(evidence, windows, name, other):
    said = ngram.explain(evidence(LATENTS[other]))
    scores = {judge: judged(JUDGES[judge], said, *windows(LATENTS[name]), 0) for judge in JUDGES}
    assert scores["detection"].value == pytest.approx(0.5, abs=0.05)
    assert scores["fuzzing"].value < 0.55  # below chance where it can only be right about the other tokens
    assert abs(scores["simulation"].value) < 0.15
    assert scores["intruder"].value == pytest.approx(0.2, abs=0.12)


@pytest.mark.parametrize("explainer", ["tokens", "ngram", "ensemble"])
def test_no_explanation_detects_a_latent_that_fires_on_nothing_in_particular(evidence, windows, explainer):
    said = explain(evidence(LATENTS["nothing"]), {})[explainer]
    if said.text:
        score = judged(JUDGES["detection"], said, *windows(LATENTS["nothing"]), 0)
        assert score.value == pytest.approx(0.5, abs=0.05)


def test_a_near_miss_costs_an_explanation_that_is_too_wide(evidence, windows):
    wide = tokens.explain(evidence(LATENTS["bigram"]))
    assert wide.text == "fires on ‹ good›"
    score = judged(JUDGES["detection"], wide, *windows(LATENTS["bigram"]), 0)
    assert 0.7 < score.value < 0.8  # right about the far half, at chance about the near one


def test_the_auc_is_the_share_of_pairs_ranked_rightly():
    high, low = RNG.integers(5, size=30), RNG.integers(4, size=20)
    pairs = [(h > l) + 0.5 * (h == l) for h in high for l in low]  # noqa: E741
    assert ranking_auc(high, low) == pytest.approx(np.mean(pairs))


def test_simulation_is_the_correlation_over_all_tokens(windows):
    active, silent = windows(LATENTS["polarity"])
    said = Explanation("‹ good›", predict=lambda window: (window.ids == NUMBER["good"]).astype(float))
    predicted = np.concatenate([said.predict(window) for window in active + silent])
    true = np.concatenate([window.acts for window in active + silent])
    score = JUDGES["simulation"](said, active, silent, 0)
    assert score.value == pytest.approx(np.corrcoef(predicted, true)[0, 1])


def test_what_cannot_be_judged_has_a_status_and_no_score(windows):
    active, silent = windows(LATENTS["word"])
    said = Explanation("‹ good›", predict=lambda window: np.ones(len(window.ids)))
    few = judged(JUDGES["detection"], said, active[: MIN_WINDOWS - 1], silent, 0)
    assert np.isnan(few.value)
    assert few.status == f"{MIN_WINDOWS - 1} held-out windows in which it fires, {len(silent)} others: not scored"
    assert judged(JUDGES["detection"], Explanation.none("it does not fire"), active, silent, 0).status == "it does not fire"
    assert "language model" in judged(JUDGES["detection"], Explanation("a text"), active, silent, 0).status
    full = [Window(0, True, ("x",), np.zeros(1, np.int64), np.ones(1, np.float32))] * 9
    assert judged(JUDGES["fuzzing"], said, full, silent, 0).status == "it fires at nearly all tokens of its windows"
