"""Ablation: a latent that carries the behaviour takes it along, one that does not leaves it, none changes nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_tunings import entry

from rlsae.interpretation.ablation import COLUMNS, ablation, matched_sets, rewards_without, without
from rlsae.models import blocks, replace_output
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.tuning.held_out import HeldOutPrompts

LAYER, WRITTEN, LATENTS = 1, 40, 12


@pytest.fixture(scope="module")
def directions(random_model):
    """What the latents write [F, D]: the first, the direction that raises one token; the others, next to nothing."""
    generator = torch.Generator().manual_seed(0)
    rows_FD = torch.randn(LATENTS, 32, generator=generator) * 1e-3
    unembedding_D = random_model("gpt_neox").get_output_embeddings().weight[WRITTEN].detach()
    rows_FD[0] = 40 * unembedding_D / unembedding_D.norm()
    return rows_FD


@pytest.fixture(scope="module")
def tuned(random_model, directions):
    """A model whose MLP writes that direction everywhere."""
    model = random_model("gpt_neox")
    with torch.no_grad():
        blocks(model)[LAYER].mlp.dense_4h_to_h.bias += directions[0]
    return model


@pytest.fixture(scope="module")
def sae(directions):
    """Its latents always fire, with an activation of 1."""
    return SparseAutoencoder(torch.zeros(32, LATENTS), torch.ones(LATENTS), directions, torch.zeros(32))


@pytest.fixture(scope="module")
def prompts(corpus, tokenizer, tuned):
    text = tokenizer.decode([WRITTEN])
    reward = lambda prompts, responses: [float(response.count(text)) for response in responses]  # noqa: E731
    return HeldOutPrompts.draw(corpus, tokenizer, tuned, entry(), reward, 16)


def table(tagged, density=0.01):
    tags = ["rotated" if latent in tagged else "unchanged" for latent in range(LATENTS)]
    key = {"layer": LAYER, "dictionary": "small", "seed": 0, "latent": range(LATENTS)}
    return pd.DataFrame({**key, "tag": tags, "density": density})


def test_no_latents_leave_the_output_as_it_is(sae):
    acts_RTD = torch.randn(2, 3, 32)
    assert without(sae, [])(acts_RTD) is acts_RTD


def test_what_the_latents_write_is_gone_and_the_rest_stays(sae, directions):
    acts_RTD = torch.randn(2, 3, 32)
    torch.testing.assert_close(without(sae, [0, 5])(acts_RTD), acts_RTD - directions[0] - directions[5])


def test_without_latents_the_model_writes_what_it_wrote(tuned, sae, prompts):
    (nothing,) = rewards_without(tuned, sae, LAYER, "mlp", [[]], prompts)
    np.testing.assert_array_equal(nothing, prompts.rewards(tuned))


def test_a_latent_that_carries_the_behaviour_takes_it_along(tuned, sae, prompts):
    row = ablation(table([0]), tuned, sae, "mlp", prompts, random_sets=5)
    assert list(row) == COLUMNS
    assert row["reward"] > 1
    assert row["reward_change"] < -0.9 * row["reward"]
    assert row["ci_high"] < 0
    assert row["random_quantile"] == 1
    assert abs(row["random_change"]) < 0.1 * row["reward"]


def test_a_latent_that_writes_next_to_nothing_takes_nothing_along(tuned, sae, prompts):
    row = ablation(table([3]), tuned, sae, "mlp", prompts, random_sets=5)
    assert abs(row["reward_change"]) < 0.1 * row["reward"]
    assert row["random_quantile"] < 1


def test_the_ablated_model_is_itself_again_afterwards(tuned, sae, prompts):
    before = prompts.rewards(tuned)
    with replace_output(tuned, LAYER, "mlp", without(sae, [0])):
        assert prompts.rewards(tuned).sum() < before.sum()
    np.testing.assert_array_equal(prompts.rewards(tuned), before)


def test_random_sets_are_as_dense_as_the_tagged_and_hold_none_of_them():
    density = np.geomspace(1e-4, 0.1, 200)
    tagged = [20, 100, 180]
    tags = np.where(np.isin(range(200), tagged), "added", "unchanged")
    tags[:15] = "untestable"
    sets = matched_sets(pd.DataFrame({"latent": range(200), "tag": tags, "density": density}), 50)
    assert len({tuple(sorted(latents)) for latents in sets}) > 20
    for latents in sets:
        assert len(set(latents)) == 3
        assert not set(latents) & {*tagged, *range(15)}
        assert np.log(density[sorted(latents)]) == pytest.approx(np.log(density[tagged]), abs=0.4)


def test_sets_are_smaller_where_too_few_latents_are_unchanged():
    sets = matched_sets(table(range(LATENTS - 2)), 3)
    assert [sorted(latents) for latents in sets] == [[LATENTS - 2, LATENTS - 1]] * 3
