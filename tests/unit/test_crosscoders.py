"""Dictionaries that read the rows of two models: side by side (crosscoders), or their difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_artifacts import random_documents, tiny_model, tokens_of, write_store
from small_dictionaries import CPU, autoencoder, entry_of, member_of, random_rows
from small_models import perturbed

from rlsae.activations.joint import JointStore, join, rows_of
from rlsae.activations.store import ActivationStore
from rlsae.beside import at_model
from rlsae.errors import RlsaeError
from rlsae.models import replace_output as capture
from rlsae.plants.plant import Plant, draw_rows, write_activations
from rlsae.plants.training import train_recipe
from rlsae.plants.trials import RECIPES
from rlsae.plants.trials import SHARED as SHARED_SETTINGS
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_quality
from rlsae.sae.train import build_dictionaries, new_members

CHANNELS, LATENTS, ROWS = 6, 24, 64
CROSSCODERS = ["relu", "topk", "batchtopk"]
SHARED = {"shared_share": 0.25, "shared_penalty": 0.1}


def halves(W_FE):
    return W_FE[:, :CHANNELS], W_FE[:, CHANNELS:]


def crosscoder(architecture, **changes):
    """A member in the middle of its training, with unlike decoders of the two models."""
    member = member_of(architecture, 2 * CHANNELS, LATENTS, batch_rows=ROWS, reads="both", start="independent", **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        member.b_enc_F += 0.2 * torch.randn(LATENTS, generator=generator)
        member.W_enc_FD += 0.2 * torch.randn(member.W_enc_FD.shape, generator=generator)
    return member


def loss_of(architecture, member, acts_BE, W_enc_FE, b_enc_F, W_dec_FE, b_dec_E):
    latents_BF = torch.relu(acts_BE @ W_enc_FE.T + b_enc_F)
    if architecture == "relu":
        norms_F = sum(part_FD.norm(dim=1) for part_FD in halves(W_dec_FE))
        error = (latents_BF @ W_dec_FE + b_dec_E - acts_BE).square().sum(1).mean()
        return error + (latents_BF * norms_F * member.l1_F).sum(1).mean()
    rows = latents_BF if architecture == "topk" else latents_BF.flatten()
    cut = rows.topk(member.k if architecture == "topk" else member.k * ROWS, dim=-1).values[..., -1:]
    return (latents_BF * (latents_BF >= cut) @ W_dec_FE + b_dec_E - acts_BE).square().mean()


@pytest.mark.parametrize(("architecture", "changes"), [*((name, {}) for name in CROSSCODERS), ("relu", SHARED)])
def test_gradients_are_those_of_the_loss_over_both_models(architecture, changes):
    member, acts_BE = crosscoder(architecture, **changes), random_rows(ROWS, 2 * CHANNELS)
    member.backward(acts_BE)
    leaves = [parameter.clone().requires_grad_() for parameter in member.parameters().values()]
    loss_of(architecture, member, acts_BE, *leaves).backward()
    expected = dict(zip(member.parameters(), (leaf.grad for leaf in leaves), strict=True))
    W_dec_FE = expected["W_dec_FD"]
    if architecture != "relu":  # only what turns the parts, or shifts length between them
        slope_FE = torch.cat([torch.nn.functional.normalize(part_FD, dim=1) for part_FD in halves(member.W_dec_FD)], 1)
        W_dec_FE -= slope_FE * (W_dec_FE * slope_FE).sum(1, keepdim=True) / 2
    if changes:
        shared = LATENTS // 4
        W_dec_FE[:shared] = torch.cat([sum(halves(W_dec_FE[:shared])) / 2] * 2, 1)
    for name, parameter in member.parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_two_parts_of_a_latent_have_one_length_together(architecture):
    member = crosscoder(architecture)
    member.W_dec_FD += 0.1
    member.constrain()
    torch.testing.assert_close(sum(part_FD.norm(dim=1) for part_FD in halves(member.W_dec_FD)), torch.ones(LATENTS))


def test_decoders_start_equal_or_unlike_as_the_recipe_says():
    for start, equal in (("shared", True), ("independent", False)):
        base_FD, tuned_FD = halves(member_of("topk", 2 * CHANNELS, LATENTS, reads="both", start=start).W_dec_FD)
        assert torch.equal(base_FD, tuned_FD) == equal


def test_designated_latents_write_the_same_in_both_models_through_training():
    member = member_of("relu", 2 * CHANNELS, LATENTS, batch_rows=ROWS, reads="both", start="independent", **SHARED)
    optimizer = torch.optim.Adam(member.parameters().values(), lr=0.01)
    for seed in range(5):
        member.backward(random_rows(ROWS, 2 * CHANNELS, seed))
        optimizer.step()
    base_FD, tuned_FD = halves(member.W_dec_FD)
    equal_F = (base_FD == tuned_FD).all(1)
    assert equal_F.tolist() == [True] * (LATENTS // 4) + [False] * (LATENTS - LATENTS // 4)


@pytest.fixture
def stores(tmp_path):
    """Rows of a base and a tuned model on the same tokens."""
    tokens = tokens_of(random_documents([40] * 40))
    rng = np.random.default_rng(0)
    base_ND = np.maximum(rng.normal(size=(1600, 3)), 0) @ rng.normal(size=(3, CHANNELS))
    base_ND += 0.01 * rng.normal(size=base_ND.shape)
    acts = {"base": base_ND, "tuned": base_ND + 0.2}
    folders = {role: write_store(tmp_path / role, tokens, {0: of_role}) for role, of_role in acts.items()}
    return {role: ActivationStore(folder) for role, folder in folders.items()}


@pytest.mark.parametrize("reads", ["both", "difference"])
def test_the_rows_of_two_stores_are_read_as_those_of_one(stores, reads):
    joint = rows_of(reads, "tuned", stores)
    base_ND, tuned_ND = (torch.from_numpy(store.read(0, 0, store.rows)) for store in stores.values())
    expected_NE = join(reads, base_ND, tuned_ND).numpy()
    assert joint.acts(0).shape == expected_NE.shape
    np.testing.assert_array_equal(joint.read(0, 5, 700), expected_NE[5:700])
    mean_E, second_E = joint.statistics(0)
    np.testing.assert_allclose(mean_E, expected_NE.mean(0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(second_E, np.square(expected_NE, dtype=np.float64).mean(0), atol=1e-6)
    orders = [store.row_order(0, 64, 0, 1).batches() for store in (joint, *stores.values())]
    for joint_BE, base_BD, tuned_BD in zip(*orders, strict=True):
        np.testing.assert_array_equal(joint_BE, join(reads, torch.from_numpy(base_BD), torch.from_numpy(tuned_BD)))


def test_stores_of_other_tokens_are_no_pair(stores, tmp_path):
    other = ActivationStore(
        write_store(tmp_path / "o", tokens_of(random_documents([40] * 40, seed=1)), {0: np.ones((1600, 6))})
    )
    with pytest.raises(RlsaeError, match="holds other tokens"):
        JointStore(stores["base"], other, "both")


def test_latents_are_counted_per_channel_of_one_model():
    member = new_members(entry_of("topk", reads="both", expansion=4), 2 * CHANNELS, "tuned", CPU)[0]
    assert member.W_dec_FD.shape == (4 * CHANNELS, 2 * CHANNELS)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Two models that are one: the same rows of known directions."""
    folder = tmp_path_factory.mktemp("twins")
    _, base_ND, _, _ = draw_rows(Plant(documents=300).without_changes())
    for role in ("base", "tuned"):
        write_activations(folder / role, base_ND, 300, {"seed": 0, "role": role})
    return {role: ActivationStore(folder / role) for role in ("base", "tuned")}


@pytest.mark.parametrize("architecture", CROSSCODERS)
def test_on_equal_rows_nearly_all_live_latents_have_a_norm_ratio_of_a_half(twins, architecture, tmp_path):
    """Decoders that start unlike become equal."""
    recipe = {"architecture": architecture, "reads": "both", "start": "independent"} | RECIPES[f"crosscoder_{architecture}"]
    sae = train_recipe(recipe | SHARED_SETTINGS | {"expansion": 4.0, "seeds": [0]}, 8, "tuned", twins, None, tmp_path)[0]
    quality, density_F = held_out_quality(sae, rows_of("both", "tuned", twins), 0, CPU)
    ratio_F = sae.norm_ratio()[density_F > 0]
    assert len(ratio_F) > 150
    assert ((ratio_F - 0.5).abs() <= 0.01).float().mean() >= 0.99
    assert quality["fvu_base"] == pytest.approx(quality["fvu_tuned"], rel=0.01)


@pytest.mark.parametrize("architecture", CROSSCODERS)
def test_a_crosscoder_that_was_killed_goes_on_and_ends_with_the_same_bits(stores, architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    recipe = RECIPES[f"crosscoder_{architecture}"] | SHARED_SETTINGS | {"batch_rows": ROWS}
    kind, taken = ARCHITECTURES[architecture], []

    def learn(folder, until=None):
        def backward(self, acts_BD, strength=1.0, original=kind.backward):
            if len(taken) == until:
                raise KeyboardInterrupt
            taken.append(self)
            return original(self, acts_BD, strength)

        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "backward", backward)
            return train_recipe(recipe, 2, "tuned", stores, None, tmp_path / folder)

    whole = learn("whole")
    total = len(taken)
    with pytest.raises(KeyboardInterrupt):
        learn("killed", until=15)  # between the two seeds of the eighth step
    resumed = learn("killed")
    assert len(taken) == total - 14
    for seed, sae in whole.items():
        assert torch.equal(resumed[seed].W_enc_DF, sae.W_enc_DF)
        assert torch.equal(resumed[seed].W_dec_FD, sae.W_dec_FD)


def test_a_crosscoder_tells_what_it_writes_in_each_model(tmp_path):
    W_dec_FE = [[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    made = autoencoder([[1.0, 0.0]] * 4, [0.0, 0.0], W_dec_FE, [0.0] * 4, metadata={"rlsae": {"reads": "both"}})
    made.save(tmp_path / "sae")
    sae = SparseAutoencoder.load(tmp_path / "sae")
    assert sae.parts()["base"].tolist() == [[3.0, 4.0], [0.0, 1.0]]
    assert sae.parts()["tuned"].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert sae.norm_ratio().tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "gated", "reads": "both"},
            "reads: both needs one of the architectures relu, topk, batchtopk, found gated",
        ),
        ({"architecture": "topk", "reads": "both", "start": "from_base", "continues": "x"}, "with reads: both there is none"),
        ({"architecture": "relu", "shared_share": 0.1}, "shared_share: only a crosscoder"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        entry_of(**settings)


def test_without_the_base_there_is_nothing_to_read(stores, tmp_path):
    entry = entry_of("topk", reads="difference")
    folder = stores["tuned"].path.parents[1]
    with pytest.raises(RlsaeError, match="reads: difference needs the base's activations and model"):
        build_dictionaries(entry, {}, 0, tmp_path / "out", None, folder, tmp_path, tmp_path)


@pytest.mark.parametrize("reads", ["own", "both", "difference"])
def test_beside_a_writing_model_the_other_one_reads_the_same_tokens(reads):
    """Codes while text is generated, token by token with caches, are those of both models' rows on the finished text."""
    base = tiny_model("gpt_neox", layers=2, vocabulary=50, width=CHANNELS)
    models = {"base": base, "tuned": perturbed(base, 1)}
    width = 2 * CHANNELS if reads == "both" else CHANNELS
    sae = SparseAutoencoder(
        torch.randn(width, LATENTS), torch.zeros(LATENTS), torch.randn(LATENTS, width), torch.zeros(width),
        {"rlsae": {"reads": reads}},
    )  # fmt: skip
    ids_BT, seen = torch.arange(8).view(2, 4), []
    with at_model(sae, "tuned", "base", models, 1, "mlp") as at_base, torch.no_grad():

        def note(acts_BTD):
            seen.append(at_base.encode(acts_BTD.flatten(0, 1)).view(*acts_BTD.shape[:2], -1))
            return acts_BTD

        with capture(models["base"], 1, "mlp", note):
            text_BT = models["base"].generate(ids_BT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    rows = {}
    for role, model in models.items():
        with capture(model, 1, "mlp", lambda acts_BTD, role=role: rows.setdefault(role, acts_BTD)), torch.no_grad():
            model(input_ids=text_BT[:, :-1])
    expected_NF = sae.encode(
        rows["tuned"].flatten(0, 1) if reads == "own" else join(reads, *(rows[r].flatten(0, 1) for r in rows))
    )
    torch.testing.assert_close(torch.cat(seen, 1).flatten(0, 1), expected_NF, atol=1e-4, rtol=1e-4)
