"""What a layer does when it is swapped between base and tuned: nulls, planted layers, direct computation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_artifacts import random_documents, tiny_model, tokens_of
from small_models import by_measure, perturbed
from small_tunings import entry, letters
from torch.nn.functional import kl_div

from rlsae.divergence import function as module
from rlsae.divergence.function import Sample, function_divergence, kl_of_swaps, swapped
from rlsae.errors import RlsaeError
from rlsae.models import blocks

FAMILIES = ["gpt_neox", "gpt2"]
LAYERS = 3
TOKENS = tokens_of(random_documents([5, 9, 12, 20, 7, 16, 3, 30], vocabulary=64), held_out=[False, True] * 4)
HELD_OUT = np.flatnonzero(TOKENS.held_out)


@pytest.fixture(params=FAMILIES)
def base(request):
    return tiny_model(request.param)


@pytest.fixture
def model(random_model, request):
    """A model that the tokenizer of the small corpus belongs to, with three layers."""
    return random_model(request.param)


@pytest.fixture
def sample(tokenizer, corpus):
    """Held-out documents in random tokens, prompts of the small corpus, an easy reward."""
    return Sample(TOKENS, tokenizer, corpus, letters, entry(response_tokens=(6, 12)))


def in_memory(model, other, document):
    """Σ KL(model ‖ other) of one unpadded document, by torch's own function."""
    ids = torch.from_numpy(TOKENS.ids(document).astype(np.int64))[None]
    with torch.inference_mode():
        left, right = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (model, other))
    return kl_div(right, left, reduction="sum", log_target=True).item()


def test_the_kl_of_each_document_is_that_of_the_swapped_models_computed_one_by_one(base):
    tuned = perturbed(perturbed(base, 0, scale=0.5), 2, "attention", scale=0.5)
    sums, tokens_N = kl_of_swaps(base, tuned, TOKENS)
    assert tokens_N.tolist() == [len(TOKENS.ids(document)) for document in HELD_OUT]
    for layer in range(LAYERS):
        inside, without = copy.deepcopy(base), copy.deepcopy(tuned)
        blocks(inside)[layer], blocks(without)[layer] = copy.deepcopy(blocks(tuned)[layer]), copy.deepcopy(blocks(base)[layer])
        for row, document in enumerate(HELD_OUT):
            assert sums["kl_swap_in"][row, layer] == pytest.approx(in_memory(inside, base, document), rel=1e-4, abs=1e-9)
            assert sums["kl_swap_out"][row, layer] == pytest.approx(in_memory(tuned, without, document), rel=1e-4, abs=1e-9)


def test_a_swap_ends_with_its_context_even_after_an_error(base):
    own, tuned = blocks(base)[1], perturbed(base, 1)
    with swapped(base, tuned, 1):
        assert blocks(base)[1] is blocks(tuned)[1]
    assert blocks(base)[1] is own
    with pytest.raises(KeyError), swapped(base, tuned, 1):
        raise KeyError
    assert blocks(base)[1] is own


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_equal_models_differ_by_exactly_nothing_in_every_measure_and_resample(model, sample):
    for measured in function_divergence(model, copy.deepcopy(model), sample):
        assert not measured.values_L.any(), measured.measure
        assert not measured.resampled_RL.any(), measured.measure


@pytest.mark.parametrize("planted", [0, 1])
@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_every_swap_measure_ranks_a_planted_layer_first_and_the_others_do_nothing(model, sample, planted):
    found = function_divergence(model, perturbed(model, planted, scale=1.0), sample)
    assert {m.measure for m in found} == {"kl_swap_in", "kl_swap_out", "reward_swap_in", "reward_swap_out"}
    for measured in found:
        assert measured.ranking[0] == planted
        assert measured.distance_L[planted] > 1e-3, measured.measure
        assert not np.delete(measured.values_L, planted).any(), measured.measure


@pytest.mark.parametrize("model", ["gpt_neox"], indirect=True)
def test_with_one_changed_layer_both_directions_give_the_whole_difference_of_the_models(model, sample):
    values = by_measure(function_divergence(model, perturbed(model, 1, scale=1.0), sample))
    # Base with the tuned layer is the tuned model; the tuned model with the base's layer is the base.
    assert values["reward_swap_in"][1] == pytest.approx(values["reward_swap_out"][1], abs=1e-12)


@pytest.mark.parametrize("model", ["gpt_neox"], indirect=True)
def test_the_reward_is_that_of_sampled_responses_to_held_out_prompts(model, sample, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "PROMPTS", 10)
    counting = Sample(
        sample.tokens, sample.tokenizer, sample.corpus, lambda p, r: asked.append(p) or [1.0] * len(r), sample.entry
    )
    values = by_measure(function_divergence(model, perturbed(model, 0, scale=1.0), counting))
    assert values["reward_swap_in"] == [0.0, 0.0]
    assert len(asked) == 2 + 2 * len(blocks(model))
    assert all(prompts == asked[0] and len(prompts) == 10 for prompts in asked)


def test_equal_calls_give_equal_values(random_model, sample):
    base, tuned = random_model("gpt_neox"), perturbed(random_model("gpt_neox"), 1, scale=1.0)
    one, other = (by_measure(function_divergence(base, tuned, sample)) for _ in range(2))
    assert one == other


def test_documents_that_train_are_not_measured_on(base):
    none = tokens_of(random_documents([5, 6], vocabulary=64), held_out=[False, False])
    with pytest.raises(RlsaeError, match="held_out: no document is held out to measure layer swaps on; raise"):
        kl_of_swaps(base, base, none)


def test_models_of_other_depth_are_refused(sample):
    with pytest.raises(RlsaeError, match="no tuning of the base: layers 4, the base has 3"):
        function_divergence(tiny_model("gpt_neox"), tiny_model("gpt_neox", layers=4), sample)
