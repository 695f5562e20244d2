"""What a few latents carry of the gain of reward, whatever rows their dictionary reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_store
from small_tunings import entry

from rlsae.activations.store import ActivationStore
from rlsae.beside import OtherRows, SeenFrom
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.write_change import regress_pair
from rlsae.interpretation.interventions.carried import COLUMNS, _written, carried
from rlsae.models import blocks, replace_output
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.tuning.fixed_prompts import FixedPrompts

LAYER, WRITTEN, HOOK, WIDTH = 1, 40, "mlp", 32
CPU = torch.device("cpu")
KEY = {"layer": LAYER, "dictionary": "small", "seed": 0}


@pytest.fixture(scope="module")
def added(random_model):
    """What the tuned model's MLP writes everywhere beside what the base's writes: a direction that raises one token."""
    unembedding_D = random_model("gpt_neox").get_output_embeddings().weight[WRITTEN].detach()
    return 40 * unembedding_D / unembedding_D.norm()


@pytest.fixture(scope="module")
def models(random_model, added):
    models = {"base": random_model("gpt_neox"), "tuned": random_model("gpt_neox")}
    with torch.no_grad():
        blocks(models["tuned"])[LAYER].mlp.dense_4h_to_h.bias += added
    return models


@pytest.fixture(scope="module")
def rows(models, tmp_path_factory):
    """Rows of both models on the same text."""
    folder, tokens, stores = tmp_path_factory.mktemp("stores"), tokens_of(random_documents([20] * 120)), {}
    for role, model in models.items():
        kept = []
        with torch.no_grad(), replace_output(model, LAYER, HOOK, lambda acts, kept=kept: kept.append(acts) or acts):
            model(torch.from_numpy(np.stack(np.split(tokens.token, 120))).long())
        stores[role] = ActivationStore(write_store(folder / role, tokens, {LAYER: kept[0].flatten(0, 1).double().numpy()}))
    return PairedRows(stores["base"], stores["tuned"], LAYER)


@pytest.fixture(scope="module")
def prompts(corpus, tokenizer, models):
    text = tokenizer.decode([WRITTEN])
    reward = lambda prompts, responses: [float(response.count(text)) for response in responses]  # noqa: E731
    return FixedPrompts.draw(corpus, tokenizer, models["tuned"], entry(), reward, 16)


def dictionary(reads, added):
    """Its first latent fires with 1 where the tuned model writes what was added, and writes that; the second writes nothing."""
    nothing_D, reader_D = torch.zeros(WIDTH), added / added.square().sum()
    W_dec_FD, b_enc_F = torch.stack([added, nothing_D]), torch.zeros(2)
    if reads == "own":
        W_enc_DF, b_enc_F = torch.zeros(WIDTH, 2), torch.ones(2)
    elif reads == "difference":
        W_enc_DF = torch.stack([reader_D, nothing_D], 1)
    else:
        W_enc_DF = torch.stack([torch.cat([-reader_D, reader_D]), torch.cat([nothing_D, nothing_D])], 1)
        W_dec_FD = torch.stack([torch.cat([nothing_D, added]), torch.cat([nothing_D, nothing_D])])
    return SparseAutoencoder(W_enc_DF, b_enc_F, W_dec_FD, torch.zeros(W_dec_FD.shape[1]), {"rlsae": {"reads": reads}})


@pytest.mark.parametrize("reads", ["own", "both", "difference"])
def test_without_the_latent_that_the_tuning_added_the_whole_gain_is_lost(models, rows, prompts, added, reads):
    maps, sets = fit_linear_maps(rows, CPU), {"reward": [0], "tagged": [1]}
    found = carried(KEY, dictionary(reads, added), sets, models, HOOK, rows, maps, prompts)
    assert list(found[0]) == COLUMNS
    assert [row["reads"] for row in found] == [reads, reads]
    assert found[0]["ablated"] == pytest.approx(1, abs=0.02)
    assert found[1]["ablated"] == pytest.approx(0, abs=0.02)
    for row in found:
        assert row["ablated_low"] <= row["ablated"] <= row["ablated_high"]
        assert row["transplanted"] == pytest.approx(0, abs=0.02)  # what never varies is the shift of the mean, not a latent's


@pytest.mark.parametrize("reads", ["own", "both", "difference"])
def test_a_transplant_adds_what_the_latents_write_in_tuned_beyond_base(rows, reads):
    width = 2 * WIDTH if reads == "both" else WIDTH
    generator = torch.Generator().manual_seed(0)
    W_enc_DF = torch.randn(width, 12, generator=generator)
    sae = SparseAutoencoder(W_enc_DF, torch.zeros(12), W_enc_DF.T.contiguous(), torch.zeros(width), {"rlsae": {"reads": reads}})
    fit = regress_pair(sae, "tuned", rows, fit_linear_maps(rows, CPU), CPU)
    base_BTD, tuned_BTD = torch.randn(2, 2, 4, WIDTH, generator=generator)
    seen = SeenFrom(sae, "base", OtherRows(tuned_BTD))
    read = {"own": tuned_BTD, "both": torch.cat([base_BTD, tuned_BTD], 2), "difference": tuned_BTD - base_BTD}[reads]
    latents_N = sae.encode(read.flatten(0, 1))[:, 3] - fit.mean_F[3]
    base_FD, tuned_FD = fit.writes_FE.chunk(2, 1)
    expected_ND = base_BTD.flatten(0, 1) + torch.outer(latents_N, tuned_FD[3] - base_FD[3])
    found_BTD = _written(seen, fit, [3])(base_BTD)
    torch.testing.assert_close(found_BTD.flatten(0, 1), expected_ND.float(), rtol=1e-4, atol=1e-5)
