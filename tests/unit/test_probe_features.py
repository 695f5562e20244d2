"""What probes read: batches give what one text at a time gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import perturbed

from rlsae.interpretation.probes import features as module
from rlsae.interpretation.probes.features import FEATURES, all_features, random_projection, token_counts
from rlsae.interpretation.probes.spans import Span
from rlsae.models import blocks, component, output_tensor
from rlsae.sae.activation_functions import TopK
from rlsae.sae.dictionary import SparseAutoencoder

CHANNELS, LATENTS = 32, 48
SPANS = [Span([5, 9, 20, 31], 3, 4), Span([7, 8], 0, 2), Span([40, 41, 42, 43, 44, 45, 3, 1], 4, 8), Span([5, 9, 20, 31], 1, 3)]


def dictionary(seed):
    generator = torch.Generator().manual_seed(seed)
    W_DF, b_F = torch.randn(CHANNELS, LATENTS, generator=generator), torch.randn(LATENTS, generator=generator)
    return SparseAutoencoder(W_DF, b_F, W_DF.T.contiguous(), torch.zeros(CHANNELS), activation=TopK(4))


SAES = {(role, layer): dictionary(2 * layer + (role == "tuned")) for role in ("base", "tuned") for layer in (0, 1)}


def slowly(model, role, span, hook="mlp"):
    """Latents and activations of one span, from one text at a time."""
    latents, raw = [], []
    for layer in (0, 1):
        kept = []
        handle = component(blocks(model)[layer], hook).register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        with torch.no_grad():
            model(input_ids=torch.tensor([span.ids]))
        handle.remove()
        acts_TD = output_tensor(kept[0])[0][span.first : span.last]
        latents.append(torch.stack([SAES[role, layer].encode(act[None])[0] for act in acts_TD]).mean(0))
        raw.append(acts_TD.mean(0))
    return torch.cat(latents).numpy(), torch.cat(raw).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 12, 4096])
def test_features_are_those_of_one_text_at_a_time(model, monkeypatch, batch_tokens):
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    tuned = perturbed(model, 1)
    found = all_features(SPANS, model, tuned, "mlp", SAES)
    assert list(found)[:4] == list(FEATURES)[:4]
    assert set(found) == set(FEATURES)
    for row, span in enumerate(SPANS):
        for role, lm in (("base", model), ("tuned", tuned)):
            latents_F, raw_D = slowly(lm, role, span)
            np.testing.assert_allclose(found[f"{role}_sae"][row], latents_F, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(found[f"{role}_raw"][row], raw_D, rtol=1e-3, atol=1e-4)


def test_the_model_has_no_hooks_left_afterwards(random_model):
    model = random_model("gpt2")
    all_features(SPANS, model, model, "block", SAES)  # a forward pass may leave hooks of transformers itself
    before = [len(module._forward_hooks) for module in model.modules()]
    all_features(SPANS, model, model, "block", SAES)
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_a_random_projection_has_as_many_features_as_the_dictionaries_and_equal_seeds_equal_ones(random_model):
    model = random_model("gpt_neox")
    found = all_features(SPANS, model, model, "mlp", SAES, seed=3)
    assert found["random_projection"].shape == found["tuned_sae"].shape == (len(SPANS), 2 * LATENTS)
    np.testing.assert_array_equal(found["random_projection"], random_projection(found["tuned_raw"], 2 * LATENTS, seed=3))
    assert (found["random_projection"] >= 0).all()


def test_a_bag_of_words_counts_the_tokens_up_to_the_end_of_the_span():
    counts = token_counts([Span([4, 9, 4], 2, 3), Span([9, 7, 7, 1], 1, 3)])
    assert counts.tolist() == [[2, 0, 1], [0, 2, 1]]
