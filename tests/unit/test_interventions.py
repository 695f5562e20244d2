"""Interventions: nothing chosen changes nothing, and a latent that carries the behaviour takes it along."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_store
from small_tunings import entry

from rlsae.activations.store import ActivationStore
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.errors import RlsaeError
from rlsae.interpretation.interventions import ablation, steering, transplant
from rlsae.interpretation.interventions.edit import Edit, edited
from rlsae.interpretation.interventions.effects import Place, effects, of_blocks, rewards
from rlsae.interpretation.reward_gradient import Rewarded, reward_gradients
from rlsae.models import blocks, replace_output
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.tuning.fixed_prompts import FixedPrompts

LAYER, WRITTEN, LATENTS, HOOK = 1, 40, 12, "mlp"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directions(random_model):
    """What the latents write [F, D]: the first, the direction that raises one token; the others, next to nothing."""
    generator = torch.Generator().manual_seed(0)
    rows_FD = torch.randn(LATENTS, 32, generator=generator) * 1e-3
    unembedding_D = random_model("gpt_neox").get_output_embeddings().weight[WRITTEN].detach()
    rows_FD[0] = 40 * unembedding_D / unembedding_D.norm()
    return rows_FD


@pytest.fixture(scope="module")
def base(random_model):
    return random_model("gpt_neox")


@pytest.fixture(scope="module")
def tuned(random_model, directions):
    """A model whose MLP writes that direction everywhere."""
    model = random_model("gpt_neox")
    with torch.no_grad():
        blocks(model)[LAYER].mlp.dense_4h_to_h.bias += directions[0]
    return model


@pytest.fixture(scope="module")
def place(tuned):
    return Place(tuned, LAYER, HOOK)


@pytest.fixture(scope="module")
def sae(directions):
    """Its latents always fire, with an activation of 1."""
    return SparseAutoencoder(torch.zeros(32, LATENTS), torch.ones(LATENTS), directions, torch.zeros(32))


@pytest.fixture(scope="module")
def draw(corpus, tokenizer, tuned):
    text = tokenizer.decode([WRITTEN])
    reward = lambda prompts, responses: [float(response.count(text)) for response in responses]  # noqa: E731
    return lambda count, **given: FixedPrompts.draw(corpus, tokenizer, tuned, entry(), reward, count, **given)


@pytest.fixture(scope="module")
def prompts(draw):
    return draw(16)


def table(tagged, density=0.01, gradient=0.0):
    tags = ["rotated" if latent in tagged else "unchanged" for latent in range(LATENTS)]
    key = {"layer": LAYER, "dictionary": "small", "seed": 0, "latent": range(LATENTS)}
    return pd.DataFrame({**key, "tag": tags, "density": density, "reward_gradient": gradient})


def with_edits(place, sae, edits, prompts):
    return rewards(place, lambda some: edited(sae, edits[some]), len(edits), prompts)


# --- edits -------------------------------------------------------------------------------------------------------


def test_no_latents_leave_the_output_as_it_is(sae):
    acts_BTD = torch.randn(2, 3, 32)
    assert edited(sae, [Edit(), Edit()])(acts_BTD) is acts_BTD


@pytest.mark.parametrize(
    ("edit", "factor"),
    [(Edit((0, 5)), -1), (Edit((0, 5), gain=3.0), 2), (Edit((0, 5), gain=1.0), 0), (Edit((0, 5), clamp=(4.0, 4.0)), 3)],
)
def test_an_edit_moves_what_its_latents_write_and_nothing_else(sae, directions, edit, factor):
    acts_BTD = torch.randn(2, 3, 32)
    expected = acts_BTD + factor * (directions[0] + directions[5])
    torch.testing.assert_close(edited(sae, [edit])(acts_BTD), expected)


def test_what_the_dictionary_misses_stays(directions):
    dictionary = SparseAutoencoder(torch.randn(32, LATENTS), torch.zeros(LATENTS), directions, torch.randn(32))
    acts_BTD = torch.randn(2, 3, 32)
    latents = dictionary.encode(acts_BTD.flatten(0, 1))
    error = acts_BTD.flatten(0, 1) - dictionary.decode(latents)
    latents[:, [2, 7]] = 0
    expected = dictionary.decode(latents) + error
    torch.testing.assert_close(edited(dictionary, [Edit((2, 7))])(acts_BTD).flatten(0, 1), expected)


def test_every_block_of_rows_gets_its_edit(sae):
    edits = [Edit((0,)), Edit(), Edit((3, 1), gain=2.0), Edit((5,), clamp=(0.5,))]
    acts_BTD = torch.randn(8, 3, 32)
    together = edited(sae, edits)(acts_BTD)
    for edit, before, after in zip(edits, acts_BTD.chunk(4), together.chunk(4), strict=True):
        torch.testing.assert_close(after, edited(sae, [edit])(before))


@pytest.mark.parametrize("latent", [-1, LATENTS])
def test_a_latent_that_the_dictionary_does_not_have_is_refused(sae, latent):
    with pytest.raises(RlsaeError, match=f"latent {latent} is to be edited; the dictionary has latents 0 to {LATENTS - 1}"):
        edited(sae, [Edit((latent,))])


# --- the same noise for all --------------------------------------------------------------------------------------


def test_without_latents_the_model_writes_what_it_wrote(place, sae, prompts):
    nothing = with_edits(place, sae, [Edit(), Edit()], prompts)
    np.testing.assert_array_equal(nothing, [prompts.rewards(place.model)] * 2)


def test_an_edit_has_the_same_effect_alone_and_among_others(place, sae, prompts, monkeypatch):
    edits = [Edit((0,)), Edit((1,)), Edit((0, 2), gain=0.5)]
    together = with_edits(place, sae, edits, prompts)
    alone = np.concatenate([with_edits(place, sae, [edit], prompts) for edit in edits])
    np.testing.assert_array_equal(together, alone)
    monkeypatch.setattr("rlsae.tuning.fixed_prompts.RESPONSES", 5)
    np.testing.assert_array_equal(with_edits(place, sae, edits, prompts), together)


def test_responses_are_samples_of_the_models_distribution(draw, tokenizer, base):
    """The share of first tokens equals their probability: adding Gumbel noise and taking the largest is sampling."""
    prompts = draw(1)
    many = FixedPrompts(tokenizer, prompts.queries * 400, np.full(400, 1), prompts.reward, seed=1)
    ids = torch.cat([rollout.response_ids_BR[:, 0] for _, rollout in many.responses(base)])
    with torch.no_grad():
        probabilities = base(torch.tensor(prompts.queries)).logits[0, -1].softmax(-1)
    top = probabilities.argsort(descending=True)[:40]
    expected, found = probabilities[top].sum().item(), np.isin(ids, top).mean()
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected / 400))
    assert len(set(ids.tolist())) > 20


def test_the_model_is_itself_again_afterwards(place, sae, prompts):
    before = prompts.rewards(place.model)
    with replace_output(place.model, LAYER, HOOK, edited(sae, [Edit((0,))])):
        assert prompts.rewards(place.model).sum() < before.sum()
    np.testing.assert_array_equal(prompts.rewards(place.model), before)


# --- ablation ----------------------------------------------------------------------------------------------------


def ablate(place, sae, prompts, latent):
    (row,) = ablation.ablations(table([]), "tuned", place, sae, prompts, {"reward": [latent]}, random_sets=5)
    return row


def test_a_latent_that_carries_the_behaviour_takes_it_along(place, sae, prompts):
    row = ablate(place, sae, prompts, 0)
    assert list(row) == ablation.COLUMNS
    assert row["reward"] > 1
    assert row["reward_change"] < -0.9 * row["reward"]
    assert row["ci_high"] < 0
    assert row["random_quantile"] == 1
    assert abs(row["random_change"]) < 0.1 * row["reward"]


def test_a_latent_that_writes_next_to_nothing_takes_nothing_along(place, sae, prompts):
    row = ablate(place, sae, prompts, 3)
    assert abs(row["reward_change"]) < 0.1 * row["reward"]
    assert row["random_quantile"] < 1


def test_the_sets_are_the_tagged_latents_and_those_with_the_largest_gradient():
    gradient = np.linspace(-1, 1, LATENTS)
    assert ablation.sets_of(table([4], gradient=gradient), 2) == {"tagged": [4], "reward": [11, 10]}
    assert ablation.sets_of(table([], gradient=-1.0), 2) == {}


def test_random_sets_are_as_dense_as_the_chosen_and_hold_no_changed_latents():
    density = np.geomspace(1e-4, 0.1, 200)
    chosen, tagged = [20, 100, 180], [30, 31]
    tags = np.where(np.isin(range(200), tagged), "added", "unchanged")
    tags[:15] = "untestable"
    sets = ablation.matched_sets(pd.DataFrame({"latent": range(200), "tag": tags, "density": density}), chosen, 50)
    assert len({tuple(sorted(latents)) for latents in sets}) > 20
    for latents in sets:
        assert len(set(latents)) == 3
        assert not set(latents) & {*chosen, *tagged, *range(15)}
        assert np.log(density[sorted(latents)]) == pytest.approx(np.log(density[chosen]), abs=0.4)


def test_sets_are_smaller_where_too_few_latents_are_unchanged():
    tagged = list(range(LATENTS - 2))
    sets = ablation.matched_sets(table(tagged), tagged, 3)
    assert [sorted(latents) for latents in sets] == [[LATENTS - 2, LATENTS - 1]] * 3


# --- gradient of the reward --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weak(directions):
    """A dictionary whose first latent writes little enough for the reward to be a smooth function of it."""
    rows_FD = directions.clone()
    rows_FD[0] *= 0.1
    return SparseAutoencoder(torch.zeros(32, LATENTS), torch.ones(LATENTS), rows_FD, torch.zeros(32))


@pytest.fixture(scope="module")
def many(draw):
    """Training prompts, each several times with noise of its own."""
    few = draw(60, held_out=False)
    return FixedPrompts(few.tokenizer, few.queries * 12, np.tile(few.limits, 12), few.reward, seed=5)


def test_the_gradient_finds_the_latent_that_carries_the_reward(base, weak, many):
    ((gradient_F, error_F),) = reward_gradients(Place(base, LAYER, HOOK), [weak], Rewarded.by(base, many))
    assert gradient_F.argmax() == 0
    assert gradient_F[0] > 3 * error_F[0]
    assert np.abs(gradient_F[1:]).max() < 0.05 * gradient_F[0]


def test_the_gradient_is_the_slope_of_the_expected_reward(base, weak, many):
    """Against the difference of mean rewards at two gains."""
    place = Place(base, LAYER, HOOK)
    ((gradient_F, error_F),) = reward_gradients(place, [weak], Rewarded.by(base, many))
    low, high = with_edits(place, weak, [Edit((0,), gain=0.5), Edit((0,), gain=1.5)], many).mean(1)
    assert gradient_F[0] == pytest.approx(high - low, abs=3 * error_F[0])
    assert high - low > 2 * error_F[0]


def test_dictionaries_of_one_place_are_scored_together_as_alone(place, sae, draw):
    other = SparseAutoencoder(torch.randn(32, 5), torch.zeros(5), torch.randn(5, 32), torch.zeros(32))
    rewarded = Rewarded.by(place.model, draw(20, held_out=False))
    together = reward_gradients(place, [sae, other], rewarded)
    for one, alone in zip(together, [sae, other], strict=True):
        np.testing.assert_allclose(one, reward_gradients(place, [alone], rewarded)[0], rtol=1e-6)


# --- dose and response -------------------------------------------------------------------------------------------


def test_reward_grows_with_the_gain_and_a_gain_of_one_changes_nothing(place, sae, prompts, base):
    key = {"policy": "tuned", "layer": LAYER, "dictionary": "small", "seed": 0}
    rows = steering.dose_response(key, place, sae, prompts, base, {"reward": [0]}, [0.0, 0.5, 2.0])
    assert list(rows[0]) == steering.COLUMNS
    assert [row["gain"] for row in rows] == [0.0, 0.5, 1.0, 2.0]
    for low, high in itertools.pairwise(row["reward"] for row in rows):
        assert low <= high
    one = rows[2]
    assert (one["reward_change"], one["ci_low"], one["ci_high"]) == (0, 0, 0)
    assert one["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["kl"] > 0.1


def test_kl_and_perplexity_equal_those_computed_token_by_token(place, sae, base, draw):
    prompts = draw(3)
    edit = [Edit((0,), gain=0.7)]
    found = effects(place, lambda some: edited(sae, edit[some]), 1, prompts, base)
    kl, nll, tokens = 0.0, 0.0, 0
    with replace_output(place.model, LAYER, HOOK, edited(sae, edit)):
        ((_, rollout),) = list(prompts.responses(place.model))
    for row in range(3):
        query = prompts.queries[row]
        response = rollout.response_ids_BR[row][rollout.response_mask_BR[row]].tolist()
        ids = torch.tensor([query + response])
        with torch.no_grad():
            plain = place.model(ids).logits[0].log_softmax(-1)
            under_base = base(ids).logits[0].log_softmax(-1)
            with replace_output(place.model, LAYER, HOOK, edited(sae, edit)):
                changed = place.model(ids).logits[0].log_softmax(-1)
        for step, token in enumerate(response):
            at = len(query) + step - 1
            kl += (changed[at].exp() * (changed[at] - plain[at])).sum().item() / 3
            nll -= under_base[at, token].item()
            tokens += 1
    assert found.kl_EN[0].mean() == pytest.approx(kl, rel=1e-4)
    assert found.perplexity(0) == pytest.approx(np.exp(nll / tokens), rel=1e-4)


# --- transplant --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def change(base, tuned, directions, tmp_path_factory):
    """Change estimated from rows of both models on the same text, with a dictionary whose latent 0 the tuning rotates."""
    tokens = tokens_of(random_documents([20] * 120))
    rows = {}
    for role, model in (("base", base), ("tuned", tuned)):
        kept = []
        with torch.no_grad(), replace_output(model, LAYER, HOOK, lambda acts, kept=kept: kept.append(acts) or acts):
            model(torch.from_numpy(np.stack(np.split(tokens.token, 120))).long())
        rows[role] = kept[0].flatten(0, 1).double().numpy()
    folder = tmp_path_factory.mktemp("stores")
    stores = {role: ActivationStore(write_store(folder / role, tokens, {LAYER: acts})) for role, acts in rows.items()}
    paired = PairedRows(stores["base"], stores["tuned"], LAYER)
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(32, LATENTS, generator=generator)
    dictionary = SparseAutoencoder(encoder, torch.zeros(LATENTS), encoder.T.contiguous(), torch.zeros(32))
    return transplant.Change.estimate(dictionary, paired, fit_linear_maps(paired, CPU), 0, CPU)


def test_a_shift_of_the_mean_brings_the_whole_reward_along(change, base, tuned, prompts):
    """The tuning adds a constant, which is what the level `mean` writes."""
    key = {"layer": LAYER, "dictionary": "small", "seed": 0}
    rows = transplant.transplants(key, Place(base, LAYER, HOOK), tuned, change, [2], prompts)
    assert list(rows[0]) == transplant.COLUMNS
    by_level = {row["level"]: row for row in rows}
    assert list(by_level) == ["mean", "map", "tagged", "map and tagged", "latents", "map and latents"]
    assert by_level["mean"]["share"] == pytest.approx(1, abs=0.1)
    assert by_level["tagged"]["share"] == pytest.approx(0, abs=0.1)
    for row in rows:
        assert row["share_low"] <= row["share"] <= row["share_high"]


def test_without_tagged_latents_their_levels_are_left_out(change):
    assert list(change.levels([])) == ["mean", "map", "latents", "map and latents"]


def test_a_transplant_of_latents_adds_the_difference_of_what_they_write(change):
    _, treatment = change.levels([3])["tagged"]
    acts_BTD = torch.randn(2, 4, 32)
    base_FD, tuned_FD = change.fit.writes_FE.chunk(2, 1)
    latents = change.sae.encode(acts_BTD.flatten(0, 1))[:, 3] - change.fit.mean_F[3]
    expected = acts_BTD.flatten(0, 1) + torch.outer(latents, tuned_FD[3] - base_FD[3])
    torch.testing.assert_close(treatment(acts_BTD).flatten(0, 1), expected.float(), check_dtype=False)


def test_blocks_get_their_treatments():
    acts_BTD = torch.randn(6, 2, 3)
    doubled, negated = of_blocks([lambda acts: 2 * acts, lambda acts: -acts])(slice(0, 2))(acts_BTD).chunk(2)
    torch.testing.assert_close(doubled, 2 * acts_BTD[:3])
    torch.testing.assert_close(negated, -acts_BTD[3:])


def test_a_share_of_no_gain_is_nan():
    assert np.isnan(transplant.share_ci95(np.ones(5), np.zeros(5))).all()
    share, low, high = transplant.share_ci95(np.array([1.0, 2, 3]), np.array([2.0, 4, 6]))
    assert (share, low, high) == pytest.approx((0.5, 0.5, 0.5))
