"""Stage `dictionaries`: training from a store, its interruptions, what base and tuned share, and the artifact."""

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
from small_results import write_results
from torch.nn.functional import normalize

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage
from rlsae.sae import train as module
from rlsae.sae.architectures import ARCHITECTURES
from rlsae.sae.dictionary import WEIGHTS, SparseAutoencoder
from rlsae.sae.evaluate import held_out_quality
from rlsae.sae.train import build_dictionaries, centre_and_scale, load_members, new_members, rows_digest, train

LAYER = 1
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
def tuned(activations, tmp_path):
    """Activations of a tuned policy on the same tokens: those of the base, a little changed."""
    store, folder = ActivationStore(activations), tmp_path / "results" / "activations" / "tiny.ppo.reviews" / "mlp"
    shutil.copytree(activations, folder)
    changed = store.acts(LAYER)[:] * 1.05 + 0.1
    tokens = tokens_of(random_documents([5 + (11 * i) % 53 for i in range(61)]))
    written = write_store(tmp_path / "tuned", tokens, {LAYER: changed}, rows_per_part=256)
    shutil.rmtree(folder / "store")
    shutil.copytree(written / "store", folder / "store")
    return folder


@pytest.fixture
def build(results, activations, tmp_path):
    """Function of a name and settings: folder of the dictionaries of one layer."""

    def dictionaries(name="small", layer=LAYER, activations=activations, recipe=None, start=None, source=None, **changes):
        out = tmp_path / "results" / "dictionaries" / name
        recipe = recipe or entry_of(**changes)
        weights, tokens = results / "models" / "tiny" / "model", results / "tokens" / "tiny.reviews"
        build_dictionaries(recipe, recipe.settings(), layer, out, None, activations, weights, tokens, start, source)
        return out

    return dictionaries


@pytest.fixture
def trained(activations, tmp_path):
    """Function of settings: members and curves of a training without its stage."""

    def run(store=None, layer=LAYER, **changes):
        store, recipe = store or ActivationStore(activations), entry_of(**changes)
        mean_D, scale = centre_and_scale(store, layer, recipe.normalize, CPU)
        order = store.row_order(layer, recipe.batch_rows, module.ROW_ORDER_SEED, recipe.epochs)
        members = new_members(recipe, order.shape[1], "tiny", CPU)
        with Stage("dictionaries", tmp_path / "trained", recipe.settings(), {}) as stage:
            curves = train(members, order, recipe, mean_D, scale, stage)
        return members, curves

    return run


def weights_of(folder, seed=0):
    return (folder / f"saes/seed{seed}" / WEIGHTS).read_bytes()


# --- training ----------------------------------------------------------------------------------------------------


def test_rows_are_centred_and_their_mean_variance_is_one(activations):
    store = ActivationStore(activations)
    mean_D, scale = centre_and_scale(store, LAYER, True, CPU)
    rows = (store.acts(LAYER)[:] - mean_D.numpy()) * scale
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    assert rows.var(0).mean() == pytest.approx(1, rel=1e-5)


def test_rows_are_left_as_they_are_where_the_recipe_says_so(activations):
    mean_D, scale = centre_and_scale(ActivationStore(activations), LAYER, False, CPU)
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
    members, _ = trained(store, 0, epochs=40, batch_rows=128, l1=0.05, expansion=1.5, seeds=[0], learning_rate=1e-2)
    mean_D, scale = centre_and_scale(store, 0, True, CPU)
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


# --- base and tuned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ENTRIES)
def test_a_base_compared_with_itself_has_identical_dictionaries(build, activations, tmp_path, architecture):
    twin = tmp_path / "results" / "activations" / "tiny.ppo.reviews" / "mlp"
    shutil.copytree(activations, twin)
    base, other = build("base", architecture=architecture), build("tuned", architecture=architecture, activations=twin)
    for seed in (0, 1):
        assert weights_of(base, seed) == weights_of(other, seed)
    assert Manifest.read(base).metrics == Manifest.read(other).metrics


def test_base_and_tuned_start_equal_unless_the_recipe_lets_each_start_on_its_own():
    def first(policy, start):
        return new_members(entry_of(start=start), 32, policy, CPU)[0].W_FD

    assert torch.equal(first("tiny", "shared"), first("tiny.ppo", "shared"))
    assert (first("tiny", "independent") @ first("tiny.ppo", "independent").T).max() < 0.9
    assert torch.equal(first("tiny", "independent"), first("tiny", "independent"))


def test_the_rows_of_base_and_tuned_have_one_digest_and_other_rows_another(activations, tuned, tmp_path):
    def of(folder, layer=LAYER, batch_rows=64, epochs=2):
        return rows_digest(ActivationStore(folder).row_order(layer, batch_rows, module.ROW_ORDER_SEED, epochs))

    tokens = tokens_of(random_documents([5 + (11 * i) % 53 for i in range(61)], seed=1))
    acts = {LAYER: np.zeros((tokens.start[-1], 32))}
    other = write_store(tmp_path / "other", tokens, acts, rows_per_part=256)
    assert of(activations) == of(tuned)
    assert len({of(activations), of(activations, batch_rows=32), of(activations, epochs=1), of(other)}) == 4


@pytest.mark.parametrize("architecture", ENTRIES)
def test_base_and_tuned_go_on_from_the_autoencoders_of_the_base(build, tuned, architecture):
    trained = build("trained", architecture=architecture, epochs=4)
    settings = {"architecture": architecture, "start": "from_base", "continues": "trained", "learning_rate": 1e-9}
    for name, rows in (("base", {}), ("tuned", {"activations": tuned})):
        out = build(name, start=trained, recipe=entry_of(**settings, sparsity_warmup_share=0.0), **rows)
        for seed in (0, 1):
            before, after = (SparseAutoencoder.load(folder / f"saes/seed{seed}") for folder in (trained, out))
            torch.testing.assert_close(after.W_dec_FD, before.W_dec_FD, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(after.W_enc_DF, before.W_enc_DF, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(after.b_enc_F, before.b_enc_F, rtol=1e-3, atol=1e-4)
        assert "dictionaries/trained" in Manifest.read(out).inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "relu"}, "holds tied_relu with 1 latents per channel; relu with 1 cannot go on from it"),
        ({"expansion": 2}, "holds tied_relu with 1 latents per channel; tied_relu with 2 cannot go on from it"),
        ({"seeds": [0, 5]}, r"seeds: .* has no seed 5 to go on from; it has \[0, 1\]"),
    ],
)
def test_dictionaries_that_cannot_be_continued_are_refused_with_the_difference(build, changes, message):
    trained = build("trained")
    recipe = entry_of(**{"architecture": "tied_relu", "start": "from_base", "continues": "trained"} | changes)
    with pytest.raises(RlsaeError, match=message):
        build("on", start=trained, recipe=recipe)


def test_a_continuation_without_what_it_continues_is_refused(build):
    with pytest.raises(RlsaeError, match="start: from_base needs the base's dictionaries"):
        build(recipe=entry_of(start="from_base", continues="trained"))


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
    assert set(manifest.outputs) == {"saes", "metrics.parquet"}
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
    assert manifest.metrics["seed0"].keys() == SCORES
    assert manifest.metrics["seed0"]["fvu"] == 0
    assert pd.read_parquet(out / "metrics.parquet").empty
    metadata = SparseAutoencoder.load(load_members(out)[0]).metadata
    assert (metadata["theirs"], metadata["hook_name"]) == ("kept", "gpt_neox.layers.1.mlp")


def test_an_autoencoder_of_another_width_is_refused_with_both(build, tmp_path):
    autoencoder(np.eye(8), np.zeros(8), np.eye(8), np.zeros(8)).save(tmp_path / "narrow")
    with pytest.raises(RlsaeError, match="it reads 8 channels; layer 1 of the store has 32"):
        build(recipe=entry_of("external", path="x"), source=tmp_path / "narrow")
