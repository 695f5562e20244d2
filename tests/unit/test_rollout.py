"""Prompts, sampled responses and their log-probabilities.

Shapes: B responses, Q prompt positions (padded left), R response positions (padded right), V tokens.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_tunings import entry
from torch import nn

from rlsae.corpora import DOCUMENTS
from rlsae.errors import RlsaeError
from rlsae.tuning.rollout import PolicyWithValue, Prompts, generate, next_token_logp, taken

EOS = 0
PROMPTS = [[5, 90, 17], [33], [70, 9, 11, 41, 200, 7, 8], [12, 13]]


def rollout_of(model, tokenizer, limits=(9, 4, 6, 12), prompts=PROMPTS, seed=0):
    return generate(model, tokenizer, prompts, np.array(limits), seed)


def ending(model, bias):
    """The model with a bias towards the end-of-text token."""
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[EOS] = bias
    return model


@pytest.fixture
def often_ending(random_model):
    """A model whose responses end after a few tokens."""
    return ending(random_model("gpt_neox"), 4.0)


@torch.no_grad()
def unpadded_logp(model, prompt, response):
    """Log-probabilities [R, V] of each next token of a response, computed for this sequence alone."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def responses_of(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BR, rollout.response_mask_BR, strict=True)]


# --- log-probabilities -------------------------------------------------------------------------------------------


def test_padding_on_the_left_changes_no_log_probability(model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    with torch.no_grad():
        logp_BRV = next_token_logp(model, rollout)
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses_of(rollout), strict=True)):
        expected_RV = unpadded_logp(model, prompt, response)
        assert torch.allclose(logp_BRV[row, : len(response)], expected_RV, atol=1e-4)


def test_the_log_probability_of_the_sampled_tokens_is_zero_behind_the_end(model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    with torch.no_grad():
        logp_BR = taken(next_token_logp(model, rollout), rollout)
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses_of(rollout), strict=True)):
        expected_RV = unpadded_logp(model, prompt, response)
        expected_R = expected_RV.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        assert torch.allclose(logp_BR[row, : len(response)], expected_R, atol=1e-4)
        assert (logp_BR[row, len(response) :] == 0).all()


def test_what_stands_under_the_padding_does_not_matter(model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    mask_BT = torch.cat([rollout.prompt_mask_BQ, rollout.response_mask_BR], 1)
    with torch.no_grad():
        before_BR = taken(next_token_logp(model, rollout), rollout)
        rollout.ids_BT[~mask_BT] = 99
        after_BR = taken(next_token_logp(model, rollout), rollout)
    assert torch.allclose(before_BR, after_BR, atol=1e-5)


def test_the_gradients_of_padded_responses_are_finite_and_those_of_unpadded_ones(model, random_model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    padded, alone = random_model(model.config.model_type), random_model(model.config.model_type)
    taken(next_token_logp(padded, rollout), rollout).sum().backward()
    for prompt, response in zip(PROMPTS, responses_of(rollout), strict=True):
        logits = alone(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().backward()
    for one, other in zip(padded.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-3 * other.grad.abs().max().item())


def test_the_value_head_starts_at_zero_and_reads_the_state_before_each_token(model, random_model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    policy = PolicyWithValue(random_model(model.config.model_type))
    logp_BRV, values_BR = policy(rollout)
    assert (values_BR == 0).all()
    assert torch.equal(logp_BRV, next_token_logp(policy.lm, rollout))
    nn.init.normal_(policy.value_head.weight)
    with torch.no_grad():
        _, values_BR = policy(rollout)
        for row, (prompt, response) in enumerate(zip(PROMPTS, responses_of(rollout), strict=True)):
            ids = torch.tensor([prompt + response])
            hidden_TD = policy.lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
            expected_R = policy.value_head(hidden_TD[len(prompt) - 1 : -1]).squeeze(1)
            assert torch.allclose(values_BR[row, : len(response)], expected_R, atol=1e-3)


# --- masks and ends ----------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_masked_by_their_lengths(model, tokenizer):
    rollout = rollout_of(model, tokenizer)
    assert rollout.prompt_mask_BQ.sum(1).tolist() == [len(prompt) for prompt in PROMPTS]
    assert rollout.prompt_mask_BQ[:, -1].all()
    for ids, mask, prompt in zip(rollout.ids_BT, rollout.prompt_mask_BQ, PROMPTS, strict=True):
        assert ids[: len(mask)][mask].tolist() == prompt


def test_a_prompt_that_holds_the_token_used_as_padding_is_not_masked(random_model, tokenizer):
    prompts = [[EOS, 5, EOS, 17], [EOS], [8, 9]]
    rollout = rollout_of(random_model("gpt2"), tokenizer, [4, 4, 4], prompts)
    assert rollout.prompt_mask_BQ.tolist() == [[True] * 4, [False] * 3 + [True], [False] * 2 + [True] * 2]
    with torch.no_grad():
        logp_BRV = next_token_logp(random_model("gpt2"), rollout)
    for row, (prompt, response) in enumerate(zip(prompts, responses_of(rollout), strict=True)):
        expected_RV = unpadded_logp(random_model("gpt2"), prompt, response)
        assert torch.allclose(logp_BRV[row, : len(response)], expected_RV, atol=1e-4)


def test_a_response_ends_with_its_first_end_of_text_token_or_at_its_limit(often_ending, tokenizer):
    limits = [10, 3] * 32
    rollout = rollout_of(often_ending, tokenizer, limits, [[5, 6]] * 64)
    responses = responses_of(rollout)
    assert all(EOS not in response[:-1] for response in responses)
    assert all(response[-1] == EOS or len(response) == limit for response, limit in zip(responses, limits, strict=True))
    assert all(1 <= len(response) <= limit for response, limit in zip(responses, limits, strict=True))
    ended = sum(response[-1] == EOS for response in responses)
    assert 0 < ended < 64  # both ends occur


def test_the_end_of_text_token_is_part_of_the_response_but_not_of_its_text(often_ending, tokenizer):
    rollout = rollout_of(often_ending, tokenizer, [10] * 64, [[5, 6]] * 64)
    for text, response in zip(rollout.responses, responses_of(rollout), strict=True):
        assert text == tokenizer.decode([token for token in response if token != EOS])
    assert rollout.prompts == [tokenizer.decode([5, 6])] * 64
    assert "<|endoftext|>" in tokenizer.get_vocab()
    assert not any("<|endoftext|>" in text for text in rollout.responses)


def test_the_mask_of_a_response_is_true_up_to_its_length(often_ending, tokenizer):
    rollout = rollout_of(often_ending, tokenizer, [10] * 64, [[5, 6]] * 64)
    positions_R = torch.arange(rollout.response_mask_BR.shape[1])
    assert torch.equal(rollout.response_mask_BR, positions_R < rollout.lengths_B[:, None])
    assert rollout.lengths_B.tolist() == [len(response) for response in responses_of(rollout)]


def test_rows_of_a_rollout_are_a_rollout(random_model, tokenizer):
    rollout = rollout_of(random_model("gpt2"), tokenizer)
    rollout.prompts[:] = ["a", "b", "c", "d"]
    for rows, names in ((torch.tensor([3, 1]), ["d", "b"]), (slice(1, 3), ["b", "c"])):
        part = rollout[rows]
        assert len(part) == 2
        assert part.prompts == names
        assert part.responses == [rollout.responses["abcd".index(name)] for name in names]
        assert torch.equal(part.ids_BT, rollout.ids_BT[rows])
        assert torch.equal(part.response_mask_BR, rollout.response_mask_BR[rows])
        assert torch.equal(part.prompt_mask_BQ, rollout.prompt_mask_BQ[rows])


# --- sampling ----------------------------------------------------------------------------------------------------


def test_tokens_are_sampled_from_the_whole_distribution_at_temperature_one(random_model, tokenizer):
    count = 20_000
    sampled = rollout_of(random_model("gpt2"), tokenizer, [1] * count, [[5, 6]] * count).response_ids_BR.flatten()
    expected_V = unpadded_logp(random_model("gpt2"), [5, 6], [0])[0].exp()
    found_V = torch.bincount(sampled, minlength=len(expected_V)) / count
    noise = (expected_V * (1 - expected_V) / count).sqrt().sum() / 2
    assert (found_V - expected_V).abs().sum() / 2 < 1.5 * noise


@pytest.mark.parametrize(
    "defaults",
    [{"temperature": 0.1, "top_k": 1, "top_p": 0.1}, {"repetition_penalty": 5.0}, {"min_p": 0.5}, {"do_sample": False}],
    ids=str,
)
def test_the_sampling_that_a_model_is_published_with_is_not_used(random_model, tokenizer, defaults):
    plain, tuned = random_model("qwen2"), random_model("qwen2")
    tuned.generation_config.update(**defaults)
    plain_BT, tuned_BT = (rollout_of(m, tokenizer, [12] * 16, PROMPTS * 4).ids_BT for m in (plain, tuned))
    assert torch.equal(plain_BT, tuned_BT)


def test_equal_seeds_give_equal_responses_and_other_seeds_others(random_model, tokenizer):
    model = random_model("gpt2")
    first, again, other = (rollout_of(model, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids_BT, again.ids_BT)
    assert first.responses != other.responses


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(corpus, tokenizer, random_model):
    """Function of settings: prompts of the corpus."""

    def make(query_tokens=(2, 5), response_tokens=(4, 8), held_out=False, folder=corpus):
        settings = entry(query_tokens=query_tokens, response_tokens=response_tokens)
        return Prompts(folder, tokenizer, random_model("gpt2"), settings, held_out)

    return make


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_beginnings_of_documents_of_their_side_of_the_split(prompts, corpus, tokenizer, held_out):
    documents = pd.read_parquet(corpus / DOCUMENTS)
    beginnings = [tokenizer(text)["input_ids"] for text in documents.text[documents.held_out == held_out]]
    for ids in prompts(held_out=held_out).sample(40, np.random.default_rng(0)):
        assert any(beginning[: len(ids)] == ids for beginning in beginnings)
    assert len(prompts(held_out=held_out).ids) == len(beginnings)


def test_lengths_of_prompts_are_drawn_between_the_shortest_and_the_longest(prompts):
    lengths = [len(ids) for ids in prompts(query_tokens=(2, 5)).sample(200, np.random.default_rng(0))]
    assert set(lengths) == {2, 3, 4, 5}


def test_equal_generators_draw_equal_prompts_and_others_draw_others(prompts):
    first, again, other = (prompts().sample(10, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_distinct_prompts_come_from_distinct_documents(prompts):
    source = prompts(query_tokens=(5, 5), held_out=True)
    source.ids = [[number] * 5 for number in range(75)]
    drawn = source.sample(75, np.random.default_rng(0), distinct=True)
    assert sorted(ids[0] for ids in drawn) == list(range(75))


def test_a_batch_may_be_larger_than_the_corpus(prompts):
    assert len(prompts().sample(1000, np.random.default_rng(0))) == 1000


def test_more_distinct_prompts_than_there_are_documents_are_refused(prompts):
    with pytest.raises(RlsaeError, match="evaluation_prompts: 76 are asked for, 75 held-out ones fit"):
        prompts(held_out=True).sample(76, np.random.default_rng(0), distinct=True)


def test_prompts_and_responses_that_exceed_the_context_are_refused_with_both_numbers(prompts):
    with pytest.raises(RlsaeError, match="up to 65 tokens, the model's context holds 64"):
        prompts(query_tokens=(2, 5), response_tokens=(4, 60))
    assert prompts(query_tokens=(2, 4), response_tokens=(4, 60))


@pytest.mark.parametrize(("held_out", "side"), [(False, "training"), (True, "held-out")])
def test_a_side_without_a_document_that_is_long_enough_is_named(prompts, tmp_path, held_out, side):
    documents = pd.DataFrame({"text": ["short", "also short"], "held_out": [True, False]})
    documents.to_parquet(tmp_path / DOCUMENTS)
    with pytest.raises(RlsaeError, match=f"query_tokens: no {side} document of .* has 20 tokens; lower the longest"):
        prompts(query_tokens=(2, 20), held_out=held_out, folder=tmp_path)
