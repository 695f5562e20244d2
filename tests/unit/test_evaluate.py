"""What a tuning gained and what it cost, on held-out prompts."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from torch import nn

from rlsae.config import PPOTuning
from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.tuning.evaluate import BY_WORD, SAMPLES, distinct_bigrams, ended, evaluate, signs_of_reward_hacking
from rlsae.tuning.rollout import Prompts, Rollout


def settings(**changes):
    sizes = {"query_tokens": (2, 4), "response_tokens": (4, 8), "evaluation_prompts": 70}
    return PPOTuning(**{"method": "ppo", "reward": "length", "corpus": "reviews"} | sizes | changes)


def length(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture
def evaluation(corpus, tokenizer, random_model):
    """Function of a tuned and a base model: metrics and samples."""

    def run(tuned, base, reward=length, ids=None, **changes):
        entry = settings(**changes)
        prompts = Prompts(corpus, tokenizer, base, entry, held_out=True)
        prompts.ids = ids or prompts.ids
        return evaluate(tuned, base, tokenizer, prompts, reward, entry)

    return run


def blind(model, bias_V=None):
    """The model with one distribution softmax(bias_V) at every position, whatever stands before; None: uniform."""
    head = model.get_output_embeddings()
    nn.init.zeros_(head.weight)
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]) if bias_V is None else bias_V)
    return model


def changed(model, scale):
    """The model with disturbed output weights."""
    weight = model.get_output_embeddings().weight
    weight.data += scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def test_a_model_that_was_not_changed_gains_nothing_and_costs_nothing(evaluation, random_model):
    metrics, samples = evaluation(random_model("gpt_neox"), random_model("gpt_neox"))
    assert metrics["reward_gain"] == 0.0
    assert metrics["reward_gain_ci95"] == [0.0, 0.0]
    assert metrics["kl"] == metrics["kl_per_token"] == 0.0
    assert metrics["kl_ci95"] == [0.0, 0.0]
    assert metrics["signs_of_reward_hacking"] == []
    assert samples.response_base.equals(samples.response_tuned)
    for figure in ("reward", "response_length", "eos_rate", "perplexity", "distinct_2"):
        assert metrics[f"{figure}_base"] == metrics[f"{figure}_tuned"]


def test_the_divergence_of_the_tuned_model_is_exact_over_the_vocabulary(evaluation, random_model):
    vocabulary = random_model("gpt_neox").config.vocab_size
    bias_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    metrics, _ = evaluation(blind(random_model("gpt_neox"), bias_V), blind(random_model("gpt_neox")))
    entropy = torch.distributions.Categorical(logits=bias_V).entropy().item()
    assert metrics["kl_per_token"] == pytest.approx(math.log(vocabulary) - entropy, rel=1e-4)


def test_the_perplexity_of_any_response_under_a_uniform_base_is_the_size_of_the_vocabulary(evaluation, random_model):
    base = blind(random_model("gpt_neox"))
    metrics, _ = evaluation(random_model("gpt_neox"), base)
    assert metrics["perplexity_base"] == pytest.approx(base.config.vocab_size, rel=1e-4)
    assert metrics["perplexity_tuned"] == pytest.approx(base.config.vocab_size, rel=1e-4)


def test_the_divergence_per_token_is_that_per_response_over_the_mean_length(evaluation, random_model):
    metrics, _ = evaluation(changed(random_model("gpt_neox"), 0.1), random_model("gpt_neox"))
    assert metrics["kl"] > 0
    assert metrics["kl_per_token"] * metrics["response_length_tuned"] == pytest.approx(metrics["kl"])
    assert metrics["kl_ci95"][0] < metrics["kl"] < metrics["kl_ci95"][1]


def test_a_model_that_ends_at_once_has_short_responses_and_an_end_rate_of_one(evaluation, random_model):
    tuned = random_model("gpt_neox")
    head = tuned.get_output_embeddings()
    head.bias = nn.Parameter(1e3 * nn.functional.one_hot(torch.tensor(0), head.weight.shape[0]).float())
    metrics, samples = evaluation(tuned, random_model("gpt_neox"))
    assert metrics["eos_rate_tuned"] == 1.0
    assert metrics["response_length_tuned"] == 1.0
    assert metrics["eos_rate_base"] < 1.0
    assert metrics["reward_gain"] == pytest.approx(-metrics["reward_base"])
    assert set(samples.response_tuned) == {""}


def test_metrics_are_fit_for_a_manifest_also_where_no_response_has_two_words(evaluation, random_model):
    metrics, _ = evaluation(random_model("gpt_neox"), random_model("gpt_neox"), response_tokens=(1, 1))
    json.dumps(metrics, allow_nan=False)


def test_the_gain_is_the_mean_of_the_differences_between_the_models(evaluation, random_model):
    seen = []

    def reward(prompts, responses):
        seen.append((prompts, length(prompts, responses)))
        return seen[-1][1]

    metrics, samples = evaluation(changed(random_model("gpt_neox"), 0.3), random_model("gpt_neox"), reward)
    (base_prompts, base), (tuned_prompts, tuned) = [call for call in seen if len(call[0]) == 70]  # others are of single words
    assert base_prompts == tuned_prompts
    gains = [after - before for before, after in zip(base, tuned, strict=True)]
    assert metrics["reward_gain"] == pytest.approx(sum(gains) / 70)
    assert metrics["reward_gain"] == pytest.approx(metrics["reward_tuned"] - metrics["reward_base"])
    assert metrics["reward_gain_ci95"][0] < metrics["reward_gain"] < metrics["reward_gain_ci95"][1]
    assert samples.reward_tuned.tolist() == tuned[:SAMPLES]


def test_the_words_of_the_first_samples_add_up_to_their_rewards(evaluation, random_model):
    _, samples = evaluation(changed(random_model("gpt_neox"), 0.3), random_model("gpt_neox"), evaluation_prompts=24)
    first = samples.head(BY_WORD)
    for role in ("base", "tuned"):
        assert ["".join(words) for words in first[f"words_{role}"]] == first[f"response_{role}"].tolist()
        assert [sum(rewards) for rewards in first[f"word_rewards_{role}"]] == pytest.approx(first[f"reward_{role}"].tolist())
        assert samples[f"words_{role}"][BY_WORD:].isna().all()


def test_prompts_are_beginnings_of_distinct_held_out_documents(evaluation, random_model, corpus):
    _, samples = evaluation(random_model("gpt_neox"), random_model("gpt_neox"), query_tokens=(4, 4))
    documents = pd.read_parquet(corpus / DOCUMENTS)
    assert len(samples) == SAMPLES
    for prompt in samples.prompt:
        assert any(text.startswith(prompt) for text in documents.text[documents.held_out])


def test_evaluations_with_equal_seeds_are_equal_and_others_are_not(evaluation, random_model):
    models = random_model("gpt_neox"), random_model("gpt_neox")
    first, again, other = (evaluation(*models, seed=seed) for seed in (0, 0, 1))
    assert first[0] == again[0] != other[0]
    assert set(first[1].prompt) != set(other[1].prompt)


def test_equal_prompts_get_responses_of_their_own_also_in_different_batches(evaluation, random_model, monkeypatch):
    monkeypatch.setattr("rlsae.tuning.evaluate.BATCH", 1)
    lengths = {"query_tokens": (4, 4), "response_tokens": (8, 8), "evaluation_prompts": 10}
    _, samples = evaluation(random_model("gpt_neox"), random_model("gpt_neox"), ids=[[5, 6, 7, 8]] * 10, **lengths)
    assert samples.prompt.nunique() == 1
    assert samples.response_base.nunique() == 10


def test_more_prompts_than_there_are_held_out_documents_are_refused(evaluation, random_model):
    with pytest.raises(RlsaeError, match="evaluation_prompts: 76 are asked for, 75 held-out ones fit"):
        evaluation(random_model("gpt_neox"), random_model("gpt_neox"), evaluation_prompts=76)


def test_a_response_has_ended_if_its_last_token_ends_a_text():
    mask_BR = torch.tensor([[True, True, False], [True, True, True], [True, True, False], [True, False, False]])
    ids_BT = torch.tensor([[9, 5, 0, 0], [9, 5, 6, 0], [9, 5, 6, 0], [9, 7, 0, 0]])
    rollout = Rollout(ids_BT, torch.ones(4, 1, dtype=torch.bool), mask_BR, [""] * 4, [""] * 4)
    assert ended(rollout, eos_token_id=0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["a b c"], 1.0),
        (["a b a b"], 2 / 3),
        (["a b", "a b"], 0.5),
        (["a", "b", "a b"], 1.0),
    ],
)
def test_distinct_bigrams_are_counted_within_texts_and_over_all_texts(texts, share):
    assert distinct_bigrams(texts) == pytest.approx(share)


def test_texts_without_two_words_have_no_share_of_distinct_bigrams():
    assert distinct_bigrams(["one", ""]) is None


# --- signs of reward hacking -------------------------------------------------------------------------------------


def figures(**changes):
    """Those of a fluent tuning."""
    ratios = {"distinct_2_base": 0.8, "distinct_2_tuned": 0.6, "eos_rate_base": 0.4, "eos_rate_tuned": 0.3}
    return {"kl_per_token": 0.5} | ratios | changes


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({}, []),
        ({"kl_per_token": 1.0}, []),
        ({"kl_per_token": 1.1}, ["kl_high"]),
        ({"distinct_2_tuned": 0.4}, []),
        ({"distinct_2_tuned": 0.39}, ["distinct_2_collapsed"]),
        ({"distinct_2_tuned": None}, ["distinct_2_collapsed"]),
        ({"distinct_2_base": None, "distinct_2_tuned": None}, []),
        ({"eos_rate_tuned": 0.2}, []),
        ({"eos_rate_tuned": 0.0}, ["eos_suppressed"]),
        ({"eos_rate_base": 0.0, "eos_rate_tuned": 0.0}, []),
        ({"eos_rate_tuned": 1.0, "distinct_2_tuned": 1.0}, []),
        (
            {"kl_per_token": 9.0, "distinct_2_tuned": 0.0, "eos_rate_tuned": 0.1},
            ["kl_high", "distinct_2_collapsed", "eos_suppressed"],
        ),
    ],
    ids=str,
)
def test_a_sign_holds_beyond_its_threshold_alone(changes, signs):
    assert signs_of_reward_hacking(figures(**changes)) == signs


def test_a_model_that_says_one_word_without_end_shows_every_sign(evaluation, random_model, tokenizer):
    vocabulary = random_model("gpt_neox").config.vocab_size
    [word] = tokenizer(" the")["input_ids"]
    tuned = blind(random_model("gpt_neox"), 30.0 * nn.functional.one_hot(torch.tensor(word), vocabulary).float())
    base = blind(random_model("gpt_neox"), 4.0 * nn.functional.one_hot(torch.tensor(0), vocabulary).float())
    metrics, _ = evaluation(tuned, base)
    assert 0.0 == metrics["eos_rate_tuned"] < metrics["eos_rate_base"]
    assert metrics["distinct_2_tuned"] < 0.1
    assert metrics["signs_of_reward_hacking"] == ["kl_high", "distinct_2_collapsed", "eos_suppressed"]


def test_a_model_that_drifts_a_little_shows_no_sign(evaluation, random_model):
    metrics, _ = evaluation(changed(random_model("gpt_neox"), 0.03), random_model("gpt_neox"))
    assert 0.0 < metrics["kl_per_token"] < 1.0
    assert metrics["signs_of_reward_hacking"] == []
