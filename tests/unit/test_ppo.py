"""Proximal policy optimisation: its arithmetic, its learning, and how it survives a kill."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_tunings import FAMILY, entry, equal, killed_in, letters, publisher, responses, runner, saving_after
from torch import nn

from rlsae.artifacts import MANIFEST, Manifest
from rlsae.errors import RlsaeError
from rlsae.models import load
from rlsae.resumable import Stage
from rlsae.tuning.ppo import adapt, advantages, ppo_loss, score, token_rewards, tune
from rlsae.tuning.rollout import PolicyWithValue, generate, next_token_logp, taken


@pytest.fixture
def run(random_model, tokenizer, corpus, tmp_path):
    return runner(random_model, tokenizer, corpus, tmp_path)


# --- rewards and advantages --------------------------------------------------------------------------------------


def test_the_reward_of_a_response_stands_at_its_last_token():
    rollout = responses([1, 3, 6])
    rewards_BR = token_rewards(torch.tensor([5.0, 7.0, -9.0]), torch.zeros(3, 6), rollout, kl_coefficient=0.2)
    expected_BR = torch.zeros(3, 6)
    expected_BR[0, 0], expected_BR[1, 2], expected_BR[2, 5] = 5.0, 7.0, -9.0
    assert torch.equal(rewards_BR, expected_BR)


def test_every_token_pays_for_its_divergence_from_the_base():
    kl_BR = torch.tensor([[1.0, -2.0, 0.5, 0.0, 0.0, 0.0]])
    rewards_BR = token_rewards(torch.tensor([10.0]), kl_BR, responses([3]), kl_coefficient=0.2)
    assert rewards_BR[0].tolist() == pytest.approx([-0.2, 0.4, 9.9, 0.0, 0.0, 0.0])


def slow_advantages(rewards, values, discount, gae_lambda):
    """Equation (2) of one response as it is written, by recursion."""

    def delta(t):
        following = values[t + 1] if t + 1 < len(values) else 0.0
        return rewards[t] + discount * following - values[t]

    def advantage(t):
        return delta(t) + discount * gae_lambda * advantage(t + 1) if t < len(rewards) else 0.0

    return [advantage(t) for t in range(len(rewards))]


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_those_of_the_equation_whitened_over_all_tokens(discount, gae_lambda):
    torch.manual_seed(0)
    lengths = [1, 4, 6, 3]
    mask_BR = responses(lengths).response_mask_BR
    rewards_BR, values_BR = torch.randn(4, 6) * mask_BR, torch.randn(4, 6) * mask_BR
    found_BR, returns_BR = advantages(rewards_BR, values_BR, mask_BR, discount, gae_lambda)
    rows = [
        slow_advantages(r[:n].tolist(), v[:n].tolist(), discount, gae_lambda)
        for r, v, n in zip(rewards_BR, values_BR, lengths, strict=True)
    ]
    flat = np.concatenate(rows)
    for row, (expected, length) in enumerate(zip(rows, lengths, strict=True)):
        whitened = (np.array(expected) - flat.mean()) / flat.std(ddof=1)
        assert found_BR[row, :length].tolist() == pytest.approx(whitened.tolist(), abs=1e-5)
        assert returns_BR[row, :length].tolist() == pytest.approx(
            (np.array(expected) + values_BR[row, :length].numpy()).tolist(), abs=1e-5
        )
    assert (found_BR[~mask_BR] == 0).all()
    assert (returns_BR[~mask_BR] == 0).all()


def test_with_full_lambda_and_no_discount_the_return_is_the_sum_of_the_rewards_to_come():
    rewards_BR = torch.tensor([[1.0, 2.0, 4.0]])
    _, returns_BR = advantages(rewards_BR, torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert returns_BR[0].tolist() == pytest.approx([7.0, 6.0, 4.0])


def test_advantages_of_equal_responses_are_finite():
    mask_BR = torch.ones(4, 1, dtype=torch.bool)
    found_BR, _ = advantages(torch.ones(4, 1), torch.zeros(4, 1), mask_BR, 1.0, 0.95)
    assert found_BR.flatten().tolist() == [0.0] * 4


def test_a_single_token_has_a_finite_advantage():
    one = torch.ones(1, 1)
    found_BR, _ = advantages(one, 0 * one, one.bool(), 1.0, 0.95)
    assert found_BR.isfinite().all()


# --- the coefficient of the KL penalty ---------------------------------------------------------------------------


def test_the_coefficient_rises_above_the_target_and_falls_below_it():
    settings = entry(kl_target=5.0, kl_horizon=100, batch_size=10, minibatch_size=10)
    assert adapt(0.2, 5.5, settings) == pytest.approx(0.2 * (1 + 0.1 * 10 / 100))
    assert adapt(0.2, 4.5, settings) == pytest.approx(0.2 * (1 - 0.1 * 10 / 100))
    assert adapt(0.2, 5.0, settings) == pytest.approx(0.2)


@pytest.mark.parametrize(("kl", "error"), [(1000.0, 0.2), (0.0, -0.2), (-3.0, -0.2)])
def test_the_coefficient_moves_by_no_more_than_a_fifth_of_the_share_of_the_horizon(kl, error):
    settings = entry(kl_target=5.0, kl_horizon=100, batch_size=10, minibatch_size=10)
    assert adapt(0.2, kl, settings) == pytest.approx(0.2 * (1 + error * 10 / 100))


def test_without_a_target_the_coefficient_stays():
    assert adapt(0.2, 1000.0, entry(kl_target=None)) == 0.2


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(random_model):
    made = PolicyWithValue(random_model(FAMILY))
    nn.init.normal_(made.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return made


def slow_loss(policy, rollout, old_logp_BR, old_values_BR, advantages_BR, returns_BR, settings):
    """Equation (1), negated, token by token."""
    logp_BRV, values_BR = policy(rollout)
    policy_terms, value_terms, entropies, clipped = [], [], [], 0
    for b, r in rollout.response_mask_BR.nonzero().tolist():
        ratio = math.exp(logp_BRV[b, r, rollout.response_ids_BR[b, r]].item() - old_logp_BR[b, r].item())
        low, high = 1 - settings.clip, 1 + settings.clip
        gain = advantages_BR[b, r].item()
        policy_terms.append(min(ratio * gain, min(max(ratio, low), high) * gain))
        clipped += not low <= ratio <= high
        value, old, target = values_BR[b, r].item(), old_values_BR[b, r].item(), returns_BR[b, r].item()
        near = old + min(max(value - old, -settings.value_clip), settings.value_clip)
        value_terms.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        entropies.append(torch.distributions.Categorical(logits=logp_BRV[b, r]).entropy().item())
    loss = -np.mean(policy_terms) + settings.value_coefficient * np.mean(value_terms)
    return loss, {
        "policy_loss": -np.mean(policy_terms),
        "value_loss": np.mean(value_terms),
        "entropy": np.mean(entropies),
        "clip_fraction": clipped / len(policy_terms),
    }


def test_the_loss_is_the_equation_over_the_tokens_of_the_responses_alone(policy):
    torch.manual_seed(0)
    rollout = responses([1, 4, 6, 3])
    with torch.no_grad():
        logp_BRV, values_BR = policy(rollout)
    given = [
        taken(logp_BRV, rollout) + 0.3 * torch.randn(4, 6),
        values_BR + 0.3 * torch.randn(4, 6),
        torch.randn(4, 6),
        torch.randn(4, 6),
    ]
    tokens = rollout.lengths_B.sum()
    loss, figures = ppo_loss(policy, rollout, *given, tokens, entry())
    expected, expected_figures = slow_loss(policy, rollout, *given, entry())
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert {name: figure.item() for name, figure in figures.items()} == pytest.approx(expected_figures, abs=1e-4)
    assert not any(figure.requires_grad for figure in figures.values())
    assert 0 < figures["clip_fraction"] < 1
    behind = ~rollout.response_mask_BR
    for tensor in given:
        tensor[behind] = 1e3
    assert ppo_loss(policy, rollout, *given, tokens, entry())[0].item() == pytest.approx(expected, abs=1e-5)


def test_a_token_that_has_moved_too_far_already_is_pushed_no_further(policy):
    rollout = responses([4, 4])
    zeros_BR = torch.zeros(2, 6)
    with torch.no_grad():
        old_logp_BR = taken(policy(rollout)[0], rollout) - 1.0  # every ratio is e
    settings, tokens = entry(value_coefficient=0), torch.tensor(8)
    ppo_loss(policy, rollout, old_logp_BR, zeros_BR, torch.ones(2, 6), zeros_BR, tokens, settings)[0].backward()
    assert all((parameter.grad == 0).all() for parameter in policy.lm.parameters())
    ppo_loss(policy, rollout, old_logp_BR, zeros_BR, -torch.ones(2, 6), zeros_BR, tokens, settings)[0].backward()
    assert any((parameter.grad != 0).any() for parameter in policy.lm.parameters())


def test_scores_do_not_depend_on_how_many_responses_are_scored_at_once(policy, random_model, tokenizer):
    base = random_model(FAMILY)
    nn.init.normal_(base.get_output_embeddings().weight, generator=torch.Generator().manual_seed(1))
    rollout = generate(base, tokenizer, [[5, 6], [7], [8, 9, 10]] * 3, np.array([6, 2, 4] * 3), seed=0)
    whole = score(policy, base, rollout, at_once=9)
    for one, other in zip(whole, score(policy, base, rollout, at_once=2), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert (one[~rollout.response_mask_BR] == 0).all()
    with torch.no_grad():
        assert torch.allclose(whole[1], taken(next_token_logp(base, rollout), rollout))
    assert not torch.allclose(whole[0], whole[1])


# --- tuning ------------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_zero_leaves_every_bit_of_the_model_and_a_divergence_of_exactly_zero(run, random_model):
    lm, history = run("zero", learning_rate=0.0)
    assert equal(lm, random_model(FAMILY))
    assert history.kl.tolist() == [0.0] * 3
    assert history.clip_fraction.tolist() == [0.0] * 3


def test_equal_rewards_without_a_penalty_leave_every_bit_of_the_model(run, random_model):
    lm, _ = run("equal", reward=lambda prompts, texts: [0.0] * len(texts), kl_coefficient=0.0, learning_rate=1e-2)
    assert equal(lm, random_model(FAMILY))


def test_the_divergence_is_zero_before_the_first_update_and_not_after_it(run):
    _, history = run("some", learning_rate=1e-3)
    assert history.kl[0] == 0.0
    assert (history.kl[1:] != 0).all()


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.01])
def test_tuning_raises_an_easy_reward(run, kl_coefficient):
    sizes = {"batches": 20, "batch_size": 32, "minibatch_size": 16}
    _, history = run("easy", **sizes, learning_rate=3e-3, kl_coefficient=kl_coefficient)
    assert history.reward[-4:].mean() > history.reward[:4].mean() + 0.1


def test_a_heavy_penalty_keeps_the_model_near_its_base(run):
    settings = {"batches": 10, "batch_size": 32, "minibatch_size": 16, "learning_rate": 3e-3, "kl_target": None}
    _, free = run("free", **settings, kl_coefficient=0.0)
    _, bound = run("bound", **settings, kl_coefficient=10.0)
    assert bound.kl[-3:].mean() < 0.5 * free.kl[-3:].mean()


def test_the_history_has_one_row_per_batch_with_its_rate_and_coefficient(run):
    _, history = run("history", batches=4, learning_rate=1e-3, warmup_batches=2, kl_target=1e6, kl_coefficient=0.2)
    assert history.batch.tolist() == [0, 1, 2, 3]
    assert history.learning_rate.tolist() == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert history.kl_coefficient.tolist() == pytest.approx([0.2 * (1 - 0.2 * 8 / 1000) ** k for k in range(4)])
    assert set(history) >= {"reward", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction", "response_length"}
    assert history.response_length.between(1, 6).all()
    assert history.notna().all(axis=None)


def test_the_base_is_not_changed(run, random_model, tokenizer, corpus, tmp_path):
    base = random_model(FAMILY)
    with Stage("policies", tmp_path / "base", {}, {}) as stage:
        lm, _ = tune(random_model(FAMILY), base, tokenizer, corpus, letters, entry(), stage)
    assert equal(base, random_model(FAMILY))
    assert not equal(lm, base)


def test_equal_seeds_give_equal_models_and_other_seeds_others(run):
    (first, _), (again, _), (other, _) = run("a"), run("b"), run("c", seed=1)
    assert equal(first, again)
    assert not equal(first, other)


def test_the_reward_gets_the_texts_of_prompts_and_responses(run, corpus):
    seen = []
    run(
        "texts",
        reward=lambda prompts, texts: seen.extend(zip(prompts, texts, strict=True)) or [0.0] * len(texts),
        learning_rate=0.0,
    )
    documents = pd.read_parquet(corpus / "documents.parquet")
    training = documents.text[~documents.held_out].tolist()
    assert len(seen) == 3 * 8
    assert all(any(text.startswith(prompt) for text in training) for prompt, _ in seen)
    batches = [seen[start : start + 8] for start in (0, 8, 16)]
    assert batches[0] != batches[1] != batches[2]


# --- a kill ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"], ids=["untied", "tied"])
@pytest.mark.parametrize(("saved", "killed"), [(1, 2), (4, 5), (2, 6)])
def test_a_tuning_that_was_killed_goes_on_and_ends_with_the_same_bits(run, family, saved, killed):
    settings = {"family": family, "batches": 7, "checkpoints": 2, "learning_rate": 1e-3, "kl_horizon": 10}
    whole, history = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(killed, []), stage_type=saving_after(saved), **settings)
    calls = []
    resumed, resumed_history = run("killed", reward=killed_in(99, calls), **settings)
    assert len(calls) == 7 - saved
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)


def test_a_tuning_that_was_killed_after_its_last_batch_is_not_tuned_again(run):
    whole, history = run("whole", stage_type=saving_after(3))
    calls = []
    resumed, resumed_history = run("whole", reward=killed_in(99, calls))
    assert calls == []
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)


def test_checkpoints_are_those_of_an_uninterrupted_run(run, tmp_path):
    settings = {"batches": 6, "checkpoints": 2, "learning_rate": 1e-3}
    run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(5, []), stage_type=saving_after(1), **settings)
    run("killed", **settings)
    for step in ("2", "4"):
        one, other = (load(tmp_path / f".{name}.work" / "checkpoints" / step)[0] for name in ("whole", "killed"))
        assert equal(one, other)


def test_a_checkpoint_is_the_model_after_its_batch(run, tmp_path):
    settings = {"batches": 4, "checkpoints": 1, "learning_rate": 1e-3, "warmup_batches": 4}
    final, _ = run("checkpoint", **settings)
    checkpoint, _ = load(tmp_path / ".checkpoint.work" / "checkpoints" / "2")
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(2, []), stage_type=saving_after(2), **settings)
    state = load_file(tmp_path / ".killed.work" / "state.safetensors")
    weights = {name.removeprefix("policy.lm."): t for name, t in state.items() if name.startswith("policy.lm.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.state_dict().items())
    assert not equal(checkpoint, final)


# --- the stage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def publish(random_model, tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")
    return publisher(random_model, tokenizer, corpus, tmp_path)


def test_a_tuning_is_published_with_its_checkpoints_history_samples_and_evaluation(publish):
    out = publish(checkpoints=1)
    manifest = Manifest.read(out)
    assert set(manifest.outputs) == {"model", "checkpoints", "history.parquet", "samples.parquet"}
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["2"]
    assert manifest.metrics["checkpoints"] == [2]
    assert set(manifest.inputs) == {f"models/{FAMILY}", "corpora/reviews", "file:reward"}
    assert len(pd.read_parquet(out / "history.parquet")) == 3
    assert len(pd.read_parquet(out / "samples.parquet")) == manifest.metrics["evaluation_prompts"] == 20
    for folder in (out / "model", out / "checkpoints" / "2"):
        assert load(folder)[0].config.model_type == FAMILY
    assert json.loads((out / "provenance.json").read_text())["device"] == "cpu"


def test_equal_tunings_are_published_as_equal_bytes(publish):
    first, second = publish("a"), publish("b")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


@pytest.mark.parametrize("changes", [{}, {"lora": {}}], ids=["all weights", "adapters"])
def test_a_learning_rate_of_zero_gains_nothing_and_costs_nothing(publish, changes):
    metrics = Manifest.read(publish(learning_rate=0.0, value_learning_rate=1e-2, **changes)).metrics
    assert metrics["kl"] == metrics["kl_per_token"] == metrics["reward_gain"] == 0.0
    assert metrics["kl_ci95"] == metrics["reward_gain_ci95"] == [0.0, 0.0]
    assert metrics["signs_of_reward_hacking"] == []


def test_responses_without_two_words_are_evaluated_and_published(publish):
    assert Manifest.read(publish(response_tokens=(1, 1), learning_rate=0.0)).metrics["response_length_tuned"] == 1


def test_an_evaluation_that_cannot_be_made_is_refused_before_the_tuning_and_not_after_it(publish):
    with pytest.raises(RlsaeError, match="evaluation_prompts: 76 are asked for, 75 held-out ones fit"):
        publish(evaluation_prompts=76)
    assert not publish.calls.exists()
