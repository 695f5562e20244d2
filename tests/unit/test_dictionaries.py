"""Stage `dictionaries`: training from a store, its interruptions, and the artifact."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_artifacts import random_documents, read_json, tokens_of, write_store
from small_dictionaries import CPU, ENTRIES, autoencoder, entry_of
from small_results import LAYER, builder, weights_of, write_results
from torch.nn.functional import normalize

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage
from rlsae.sae import train as module
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_quality
from rlsae.sae.train import centre_and_scale, load_members, new_members, train

SCORES = {
    "ce_recovered",
    "cosine",
    "dead_share",
    "dense_share",
    "explained_variance",
    "fvu",
    "kl_recovered",
    "l0",
    "l1",
    "outlier_share",
    "rows_held_out",
    "shrinkage",
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def results(random_model, tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return write_results(tmp_path_factory.mktemp("dictionaries") / "results", random_model("gpt_neox"), tokenizer)


@pytest.fixture(scope="module")
def activations(results):
    return results / "activations" / "tiny.reviews" / "mlp"


@pytest.fixture
def build(results, tmp_path):
    return builder(results, tmp_path)


@pytest.fixture
def trained(activations, tmp_path):
    """Function of settings: members and curves of a training without its stage."""

    def run(store=None, layer=LAYER, **changes):
        store, recipe = store or ActivationStore(activations), entry_of(**changes)
        mean_D, scale = centre_and_scale(store, layer, recipe, CPU)
        order = store.row_order(layer, recipe.batch_rows, module.ROW_ORDER_SEED, recipe.epochs)
        members = new_members(recipe, order.shape[1], "tiny", CPU)
        with Stage("dictionaries", tmp_path / "trained", recipe.settings(), {}) as stage:
            curves = train(members, order, recipe, mean_D, scale, stage)
        return members, curves

    return run


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "variance"), [("topk", "mean"), ("relu", "sum")])
def test_rows_are_centred_and_the_variance_of_a_channel_or_of_a_row_is_one(activations, architecture, variance):
    store = ActivationStore(activations)
    mean_D, scale = centre_and_scale(store, LAYER, entry_of(architecture=architecture), CPU)
    rows = (store.acts(LAYER)[:] - mean_D.numpy()) * scale
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    assert getattr(rows.var(0), variance)() == pytest.approx(1, rel=1e-5)


def test_rows_are_left_as_they_are_where_the_recipe_says_so(activations):
    mean_D, scale = centre_and_scale(ActivationStore(activations), LAYER, entry_of(normalize=False), CPU)
    assert not mean_D.any()
    assert scale == 1.0


@pytest.mark.parametrize("architecture", ["tied_relu", "batchtopk"])
def test_training_lowers_the_error(trained, architecture):
    _, curves = trained(architecture=architecture, epochs=6, learning_rate=5e-3, sparsity_warmup_share=0.0)
    for _, curve in curves.groupby("seed"):
        assert curve.mse.tail(3).mean() < 0.8 * curve.mse.head(3).mean()


def test_a_curve_has_points_for_every_seed_up_to_the_last_step(trained, activations):
    _, curves = trained()
    steps = ActivationStore(activations).row_order(LAYER, 64, module.ROW_ORDER_SEED, 2).steps
    assert list(curves.columns) == ["seed", "step", "mse", "l1", "l0"]
    for seed in (0, 1):
        assert curves[curves.seed == seed].step.tolist() == list(range(1, steps + 1))


def test_a_curve_of_the_topk_family_also_has_the_share_of_dead_latents(trained):
    _, curves = trained(architecture="topk", k=1, expansion=4, dead_rows=64)
    assert curves.dead_share.between(0, 1).all()
    assert curves.dead_share.max() > 0


def test_planted_directions_are_found(trained, tmp_path):
    rng = np.random.default_rng(0)
    truth_FD = normalize(torch.from_numpy(rng.normal(size=(24, 32)))).numpy()
    active_NF = rng.random((8000, 24)) < 0.06
    acts = {0: (active_NF * rng.uniform(1, 2, active_NF.shape)) @ truth_FD}
    tokens = tokens_of(random_documents([40] * 200))
    store = ActivationStore(write_store(tmp_path / "planted", tokens, acts, rows_per_part=1024))
    recipe = {"epochs": 40, "batch_rows": 128, "l1": 0.05, "expansion": 1.5, "seeds": [0], "learning_rate": 1e-2}
    members, _ = trained(store, 0, **recipe)
    mean_D, scale = centre_and_scale(store, 0, entry_of(**recipe), CPU)
    sae = members[0].export().reading_raw_rows(mean_D, scale)
    quality, _ = held_out_quality(sae, store, 0, CPU)
    assert quality["fvu"] < 0.12
    assert quality["l0"] < 3
    assert (sae.directions().double().numpy() @ truth_FD.T).max(0).min() > 0.9


@pytest.mark.parametrize("architecture", ENTRIES)
def test_two_seeds_in_one_job_are_bit_for_bit_those_of_two_jobs(build, architecture):
    both = build("both", architecture=architecture)
    for seed in (0, 1):
        alone = build(f"alone{seed}", architecture=architecture, seeds=[seed])
        assert weights_of(both, seed) == weights_of(alone, seed)
        assert Manifest.read(both).metrics[f"seed{seed}"] == Manifest.read(alone).metrics[f"seed{seed}"]
        curves = pd.read_parquet(both / "metrics.parquet").query("seed == @seed").reset_index(drop=True)
        pd.testing.assert_frame_equal(curves, pd.read_parquet(alone / "metrics.parquet"), check_exact=True)


def test_a_seed_has_directions_of_its_own(build):
    members = [SparseAutoencoder.load(path) for path in load_members(build()).values()]
    assert (members[0].directions() @ members[1].directions().T).diagonal().max() < 0.9


def test_gradients_are_clipped_to_the_length_that_the_recipe_allows(trained, monkeypatch):
    norms = []
    original = torch.optim.Adam.step

    def step(self, *arguments):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    trained(architecture="relu", max_grad_norm=None)
    free, norms[:] = max(norms), []
    trained(architecture="relu", max_grad_norm=0.2 * free)
    assert max(norms) == pytest.approx(0.2 * free, rel=1e-4)


# --- interruptions -----------------------------------------------------------------------------------------------


@pytest.fixture
def killed_after(monkeypatch):
    """Function of a number of steps: from then on training is killed; None: never. Counts the steps in `.taken`."""

    def limit(steps):
        limit.steps, limit.taken = steps, 0

    for kind in ARCHITECTURES.values():

        def backward(self, acts_BD, strength=1.0, original=kind.backward):
            limit.taken += 1
            if limit.steps is not None and limit.taken > limit.steps:
                raise KeyboardInterrupt
            return original(self, acts_BD, strength)

        if "backward" in vars(kind):
            monkeypatch.setattr(kind, "backward", backward)

    return limit


@pytest.mark.parametrize("architecture", ["tied_relu", "relu", "topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_bits(build, killed_after, monkeypatch, architecture, steps):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    monkeypatch.setattr(module, "CURVE_POINTS", 8)  # several steps per point, so that kills fall between two points
    settings = {"architecture": architecture, "seeds": [0], "sparsity_warmup_share": 0.5}
    killed_after(None)
    whole = build("whole", **settings)
    total = killed_after.taken
    killed_after(steps)
    with pytest.raises(KeyboardInterrupt):
        build("killed", **settings)
    killed_after(None)
    resumed = build("killed", **settings)
    assert killed_after.taken == total - steps
    assert (resumed / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()
    assert digest(resumed / "saes") == digest(whole / "saes")


def test_a_training_that_was_killed_between_two_seeds_goes_on_with_both_at_the_same_step(build, killed_after, monkeypatch):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    killed_after(None)
    whole = build("whole")
    killed_after(13)
    with pytest.raises(KeyboardInterrupt):
        build("killed")
    killed_after(None)
    assert digest(build("killed") / "saes") == digest(whole / "saes")


def test_how_often_the_state_is_saved_changes_nothing(build, monkeypatch):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    often = build("often")
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "1e9")
    assert (often / MANIFEST).read_bytes() == (build("never") / MANIFEST).read_bytes()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_too_few_rows_for_a_batch_are_refused_with_the_key(build, tmp_path):
    with pytest.raises(RlsaeError, match="batch_rows: 5000 rows per step"):
        build(batch_rows=5000)
    assert not list(tmp_path.rglob(MANIFEST))


def test_a_layer_that_was_not_stored_is_refused(build):
    with pytest.raises(RlsaeError, match=r"layer 7 is not in this store; it holds \[0, 1\]"):
        build(layer=7)


@pytest.mark.parametrize(("architecture", "key"), [("topk", "k"), ("batchtopk", "k"), ("matryoshka", "k"), ("jumprelu", "l0")])
def test_more_active_latents_than_there_are_is_refused_with_the_key(build, architecture, key):
    with pytest.raises(RlsaeError, match=f"{key}: 33 active latents of 32; lower it or raise expansion"):
        build(architecture=architecture, **{key: 33})


@pytest.mark.parametrize("architecture", ["tied_relu", "topk", "jumprelu"])
def test_a_loss_that_is_not_finite_ends_the_training_with_seed_and_step(trained, activations, monkeypatch, architecture):
    original = module._normalised

    def spoilt(*arguments):
        for step, acts_BD in enumerate(original(*arguments)):
            yield acts_BD.fill_(torch.nan) if step == 3 else acts_BD

    monkeypatch.setattr(module, "_normalised", spoilt)
    with pytest.raises(RlsaeError, match="seed 0: the loss is not finite at step 4 of"):
        trained(architecture=architecture)


def test_a_store_without_held_out_documents_is_refused_before_the_training(build, killed_after, tmp_path):
    tokens = tokens_of(random_documents([30] * 20), held_out=np.zeros(20, bool))
    acts = {LAYER: np.random.default_rng(0).normal(size=(600, 32))}
    folder = write_store(tmp_path / "results" / "activations" / "a" / "all", tokens, acts, rows_per_part=256)
    killed_after(None)
    with pytest.raises(RlsaeError, match="held_out"):
        build(activations=folder)
    assert killed_after.taken == 0


def test_a_layer_that_puts_out_one_constant_is_refused_with_its_number(build, tmp_path):
    tokens = tokens_of(random_documents([30] * 20))
    acts = {LAYER: np.ones((600, 32))}
    folder = write_store(tmp_path / "results" / "activations" / "a" / "constant", tokens, acts, rows_per_part=256)
    with pytest.raises(RlsaeError, match="layer 1"):
        build(activations=folder)


# --- the artifact ------------------------------------------------------------------------------------------------


def test_an_artifact_holds_a_dictionary_per_seed_the_curves_and_the_scores(build):
    out = build(expansion=1.5)
    manifest = Manifest.read(out)
    assert set(manifest.outputs) == {"saes", "metrics.parquet", "figures"}
    assert set(manifest.inputs) == {"activations/tiny.reviews/mlp", "tokens/tiny.reviews"}
    assert manifest.metrics.keys() == {"seed0", "seed1"}
    for scores in manifest.metrics.values():
        assert scores.keys() == SCORES | {"rows_trained", "rows_digest"}
        assert scores["explained_variance"] == pytest.approx(1 - scores["fvu"])
    assert {seed: SparseAutoencoder.load(path).latents for seed, path in load_members(out).items()} == {0: 48, 1: 48}
    assert sorted(path.name for path in load_members(out)[0].iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]


def test_rows_are_counted_as_trained_and_held_out(build, activations):
    store, scores = ActivationStore(activations), Manifest.read(build(seeds=[0])).metrics["seed0"]
    assert scores["rows_held_out"] == store.held_out_rows().sum()
    assert scores["rows_trained"] == 64 * store.row_order(LAYER, 64, 0, 2).steps


def test_a_dictionary_is_written_in_the_format_of_saelens(build):
    out = build(seeds=[4], expansion=2)
    tensors = load_file(out / "saes" / "seed4" / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (32, 64),
        "b_enc": (64,),
        "W_dec": (64, 32),
        "b_dec": (32,),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert load_file(out / "saes" / "seed4" / "sparsity.safetensors")["sparsity"].shape == (64,)
    config = read_json(out / "saes" / "seed4" / "cfg.json")
    expected = {"architecture": "standard", "d_in": 32, "d_sae": 64, "dtype": "float32", "normalize_activations": "none"}
    assert config.items() >= (expected | {"apply_b_dec_to_input": False}).items()
    assert config["metadata"]["hook_name"] == "gpt_neox.layers.1.mlp"
    assert config["metadata"]["model_name"] == "tiny"
    assert config["metadata"]["rlsae"]["seed"] == 4


@pytest.mark.parametrize(
    ("architecture", "exported"),
    [("relu", "standard"), ("topk", "topk"), ("batchtopk", "jumprelu"), ("matryoshka", "jumprelu"), ("jumprelu", "jumprelu"),
     ("gated", "gated")],
)  # fmt: skip
def test_each_architecture_is_exported_as_one_that_saelens_knows(build, architecture, exported):
    config = read_json(build(architecture=architecture, seeds=[0]) / "saes" / "seed0" / "cfg.json")
    assert config["architecture"] == exported
    assert config["metadata"]["training_architecture"] == architecture


def test_a_store_may_lie_in_any_folder(build, activations, tmp_path):
    shutil.copytree(activations, tmp_path / "dump")
    out = build("elsewhere", activations=tmp_path / "dump", seeds=[0])
    assert weights_of(out) == weights_of(build("here", seeds=[0]))


def test_the_members_of_an_unfinished_artifact_are_not_read(tmp_path):
    (tmp_path / "saes" / "seed0").mkdir(parents=True)
    with pytest.raises(RlsaeError, match="is no finished artifact"):
        load_members(tmp_path)


# --- autoencoders from elsewhere ---------------------------------------------------------------------------------


def test_an_autoencoder_from_elsewhere_is_scored_and_not_trained(build, tmp_path, killed_after):
    eye = np.eye(32)
    sae = autoencoder(np.hstack([eye, -eye]), np.zeros(64), np.vstack([eye, -eye]), np.zeros(32), metadata={"theirs": "kept"})
    sae.save(tmp_path / "perfect")
    killed_after(0)
    out = build(recipe=entry_of("external", path=str(tmp_path / "perfect")), source=tmp_path / "perfect")
    manifest = Manifest.read(out)
    assert "path" not in json.dumps(manifest.parameters)
    assert set(manifest.inputs) == {"activations/tiny.reviews/mlp", "tokens/tiny.reviews", "file:source"}
    scores = manifest.metrics["seed0"]
    assert scores.keys() == SCORES | {"rows_trained", "rows_digest"}
    assert (scores["fvu"], scores["rows_trained"], scores["rows_digest"]) == (0, None, None)
    assert pd.read_parquet(out / "metrics.parquet").empty
    metadata = SparseAutoencoder.load(load_members(out)[0]).metadata
    assert (metadata["theirs"], metadata["hook_name"]) == ("kept", "gpt_neox.layers.1.mlp")


def test_an_autoencoder_of_another_width_is_refused_with_both(build, tmp_path):
    autoencoder(np.eye(8), np.zeros(8), np.eye(8), np.zeros(8)).save(tmp_path / "narrow")
    with pytest.raises(RlsaeError, match="it reads 8 channels; layer 1 of the store has 32"):
        build(recipe=entry_of("external", path="x"), source=tmp_path / "narrow")
