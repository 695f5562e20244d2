"""Proximal policy optimisation with adapters, in bfloat16, in parts, with whitened rewards, and on every family."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_tunings import FAMILY, entry, equal, killed_in, publisher, responses, runner, saving_after
from torch import nn

from rlsae.artifacts import Manifest
from rlsae.models import load
from rlsae.tuning.policy import merged
from rlsae.tuning.ppo import advantages, ppo_loss, whiten
from rlsae.tuning.rollout import PolicyWithValue, taken

LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.fixture
def run(random_model, tokenizer, corpus, tmp_path):
    return runner(random_model, tokenizer, corpus, tmp_path)


@pytest.fixture
def publish(random_model, tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")
    return publisher(random_model, tokenizer, corpus, tmp_path)


@pytest.fixture
def policy(random_model):
    made = PolicyWithValue(random_model(FAMILY))
    nn.init.normal_(made.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return made


# --- steps in parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_the_gradients_of_the_parts_of_a_minibatch_add_up_to_its_own(policy, parts):
    torch.manual_seed(0)
    rollout = responses([1, 6, 2, 5, 3, 6, 1, 4])
    tokens = rollout.lengths_B.sum()
    with torch.no_grad():
        logp_BRV, values_BR = policy(rollout)
    given = [taken(logp_BRV, rollout) + 0.3 * torch.randn(8, 6), values_BR + 0.3 * torch.randn(8, 6)]
    given += [torch.randn(8, 6), torch.randn(8, 6)]

    def gradients(count):
        policy.zero_grad()
        sums = {}
        for rows in torch.arange(8).split(8 // count):
            loss, figures = ppo_loss(policy, rollout[rows], *[tensor[rows] for tensor in given], tokens, entry())
            loss.backward()
            sums = {name: sums.get(name, 0.0) + figure.item() for name, figure in figures.items()}
        return [parameter.grad.clone() for parameter in policy.parameters()], sums

    whole, whole_figures = gradients(1)
    found, found_figures = gradients(parts)
    for one, other in zip(whole, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, one.abs().max().item()))
    assert found_figures == pytest.approx(whole_figures, rel=1e-4)


@pytest.fixture
def gradient_norms(monkeypatch):
    """The norm of the gradients of every optimizer step, before they are clipped."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(clip(*given).item()))
    return norms


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_same_step(run, gradient_norms, parts):
    settings = {"batches": 2, "batch_size": 16, "minibatch_size": 8, "learning_rate": 1e-3, "response_tokens": (1, 8)}
    whole, history = run("whole", **settings)
    norms = gradient_norms.copy()
    gradient_norms.clear()
    found, found_history = run("parts", **settings, gradient_accumulation=parts)
    assert gradient_norms == pytest.approx(norms, rel=1e-3)
    assert len(norms) == 2 * 2 * 2
    pd.testing.assert_frame_equal(found_history, history, rtol=1e-3, atol=1e-5)
    ids_BT = torch.arange(40).reshape(4, 10)
    with torch.no_grad():
        assert torch.allclose(found(ids_BT).logits, whole(ids_BT).logits, atol=1e-3)


# --- bfloat16 ----------------------------------------------------------------------------------------------------


def test_a_tuning_in_bfloat16_multiplies_in_bfloat16_and_publishes_float32(publish, random_model, monkeypatch):
    seen = set()
    forward = nn.Linear.forward

    def spy(module, inputs):
        output = forward(module, inputs)
        seen.add((output.dtype, torch.is_grad_enabled()))
        return output

    monkeypatch.setattr(nn.Linear, "forward", spy)
    out = publish(precision="bfloat16", learning_rate=1e-2, checkpoints=1)
    assert {(torch.bfloat16, True), (torch.bfloat16, False)} <= seen
    for folder in (out / "model", out / "checkpoints" / "2"):
        weights = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        assert not equal(load(folder)[0], random_model(FAMILY))
    assert Manifest.read(out).metrics["kl"] > 0
    assert pd.read_parquet(out / "history.parquet").notna().all(axis=None)


def test_a_tuning_in_bfloat16_diverges_from_its_base_by_exactly_zero_before_the_first_update(run):
    _, history = run("half", precision="bfloat16", learning_rate=1e-3)
    assert history.kl[0] == 0.0
    assert (history.kl[1:] != 0).all()


def test_a_tuning_in_bfloat16_raises_an_easy_reward(run):
    sizes = {"batches": 20, "batch_size": 32, "minibatch_size": 16}
    _, history = run("easy", **sizes, precision="bfloat16", learning_rate=3e-3, kl_coefficient=0.0)
    assert history.reward[-4:].mean() > history.reward[:4].mean() + 0.1


def test_a_tuning_in_bfloat16_that_was_killed_ends_with_the_same_bits(run):
    settings = {"precision": "bfloat16", "batches": 4, "learning_rate": 1e-3}
    whole, history = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(3, []), stage_type=saving_after(2), **settings)
    resumed, resumed_history = run("killed", **settings)
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"], ids=["untied", "tied"])
def test_adapters_and_the_value_head_alone_are_trained(run, tmp_path, family):
    settings = {"family": family, "learning_rate": 1e-2, "value_learning_rate": 1e-2, **LORA}
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(2, []), stage_type=saving_after(2), **settings)
    state = load_file(tmp_path / ".killed.work" / "state.safetensors")
    weights = {name.removeprefix("policy."): tensor for name, tensor in state.items() if name.startswith("policy.")}
    adapters = {name for name in weights if ".lora_" in name}
    assert weights.keys() - adapters == {"value_head.weight", "value_head.bias"}
    assert all(weights[name].any() for name in adapters if ".lora_B." in name)
    assert weights["value_head.weight"].any()
    moments = [name for name in state if name.endswith(".exp_avg")]
    assert len(moments) == len(adapters) + 2


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"], ids=["untied", "tied"])
def test_a_tuning_with_adapters_is_published_as_an_ordinary_model(publish, random_model, family):
    out = publish(family=family, learning_rate=1e-2, checkpoints=1, **LORA)
    for folder in (out / "model", out / "checkpoints" / "2"):
        names = {path.name for path in folder.iterdir()}
        assert "config.json" in names
        assert not any("adapter" in name for name in names)
        assert not any("lora" in key or "base_layer" in key for key in load_file(folder / "model.safetensors"))
        lm, _ = load(folder)
        assert lm.state_dict().keys() == random_model(family).state_dict().keys()
        assert not equal(lm, random_model(family))
    assert Manifest.read(out).metrics["kl"] > 0


def test_the_published_weights_are_those_of_base_and_adapters_together(run, random_model, tokenizer):
    from peft import get_peft_model

    from rlsae.tuning.policy import lora_config

    lm = get_peft_model(random_model(FAMILY), lora_config(entry(**LORA)))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    ids_BT = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, found, base = (model(ids_BT).logits for model in (lm, merged(lm), random_model(FAMILY)))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-2)


def test_the_head_and_the_embeddings_have_no_adapters(run):
    lm, _ = run("lora", learning_rate=1e-2, **LORA)
    base, _ = run("base", learning_rate=0.0)
    different = [name for name, tensor in lm.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert different
    assert all(".layers." in name and name.endswith(".weight") and "norm" not in name for name in different)


def test_adapters_with_a_learning_rate_of_zero_leave_every_bit_of_the_model(run, model):
    settings = {"batches": 2, "learning_rate": 0.0, "value_learning_rate": 1e-2}
    lm, history = run("zero", family=model.config.model_type, **settings, **LORA)
    assert equal(lm, model)
    assert history.kl.tolist() == [0.0] * 2


def test_a_tuning_with_adapters_raises_an_easy_reward(run):
    sizes = {"batches": 20, "batch_size": 32, "minibatch_size": 16}
    _, history = run("easy", **sizes, **LORA, learning_rate=1e-2, kl_coefficient=0.0)
    assert history.reward[-4:].mean() > history.reward[:4].mean() + 0.1


def test_the_seed_draws_the_first_weights_of_the_adapters(run):
    one, again, other = (run(name, learning_rate=1e-2, seed=seed, **LORA)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert equal(one, again)
    assert not equal(one, other)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"], ids=["untied", "tied"])
@pytest.mark.parametrize(("saved", "killed"), [(1, 2), (3, 5)])
def test_a_tuning_with_adapters_that_was_killed_ends_with_the_same_bits(run, tmp_path, family, saved, killed):
    settings = {"family": family, "batches": 6, "checkpoints": 1, "learning_rate": 1e-2, **LORA}
    whole, history = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("killed", reward=killed_in(killed, []), stage_type=saving_after(saved), **settings)
    calls = []
    resumed, resumed_history = run("killed", reward=killed_in(99, calls), **settings)
    assert len(calls) == 6 - saved
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)
    one, other = (load(tmp_path / f".{name}.work" / "checkpoints" / "3")[0] for name in ("whole", "killed"))
    assert equal(one, other)


@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "adapters"])
def test_a_tuned_model_generates_by_the_settings_of_its_base(publish, tmp_path, changes):
    out = publish(**changes)
    base, _ = load(tmp_path / "results" / "models" / FAMILY / "model")
    tuned, _ = load(out / "model")
    assert tuned.generation_config.to_dict() == base.generation_config.to_dict()


# --- whitened rewards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitened_values_have_unit_variance_over_the_tokens_of_the_responses(keep_mean):
    torch.manual_seed(0)
    mask_BR = responses([1, 4, 6, 3]).response_mask_BR
    values_BR = 3 + 5 * torch.randn(4, 6)
    whitened_BR = whiten(values_BR, mask_BR, keep_mean=keep_mean)
    assert whitened_BR[mask_BR].std().item() == pytest.approx(1.0, abs=1e-5)
    expected = values_BR[mask_BR].mean().item() if keep_mean else 0.0
    assert whitened_BR[mask_BR].mean().item() == pytest.approx(expected, abs=1e-5)
    assert (whitened_BR[~mask_BR] == 0).all()


def test_what_stands_behind_the_responses_does_not_change_whitened_values():
    torch.manual_seed(0)
    mask_BR = responses([1, 4, 6, 3]).response_mask_BR
    values_BR = torch.randn(4, 6)
    disturbed_BR = values_BR.masked_fill(~mask_BR, 1e6)
    assert torch.equal(whiten(values_BR, mask_BR), whiten(disturbed_BR, mask_BR))


@pytest.mark.parametrize("mask", [[[True, False]], [[True, True]]], ids=["one token", "equal tokens"])
def test_values_without_a_spread_are_whitened_to_finite_numbers(mask):
    mask_BR = torch.tensor(mask)
    assert torch.equal(whiten(torch.full((1, 2), 7.0), mask_BR), torch.zeros(1, 2))
    assert torch.equal(whiten(torch.full((1, 2), 7.0), mask_BR, keep_mean=True), 7.0 * mask_BR)


def test_the_rewards_of_a_batch_are_whitened_around_their_mean_on_demand(run, monkeypatch):
    seen = []

    def spy(rewards_BR, values_BR, mask_BR, discount, gae_lambda):
        seen.append(rewards_BR[mask_BR])
        return advantages(rewards_BR, values_BR, mask_BR, discount, gae_lambda)

    monkeypatch.setattr("rlsae.tuning.ppo.advantages", spy)
    for whitened in (False, True):
        run(str(whitened), batches=1, whiten_rewards=whitened)
    plain, whitened = seen
    assert plain.std().item() != pytest.approx(1.0, abs=0.1)
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-5)
    assert whitened.mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert torch.corrcoef(torch.stack([plain, whitened]))[0, 1].item() == pytest.approx(1.0, abs=1e-5)
