"""Sparse autoencoders: their gradients, their training, their export and their scores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import (
    dump,
    random_documents,
    read_json,
    rows_of,
    tokens_of,
    write_policy,
    write_store,
    write_tokens,
)
from torch.nn.functional import normalize

from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.config import Dictionary
from rlsae.errors import RlsaeError
from rlsae.resumable import Stage
from rlsae.sae import train as module
from rlsae.sae.dictionary import CONFIG, WEIGHTS, SparseAutoencoder
from rlsae.sae.evaluate import ce_recovered, held_out_quality
from rlsae.sae.tied_relu import TiedRelu
from rlsae.sae.train import build_dictionaries, centre_and_scale, load_members, train

CPU = torch.device("cpu")
HOOK = "mlp"
LAYER = 1


def entry(**changes):
    return Dictionary(**{"batch_rows": 64, "epochs": 2, "seeds": [0, 1], "l1": 0.01} | changes)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def results(random_model, tokenizer, tmp_path_factory):
    """Folder with a model, tokens (1,900, a quarter held out) and a dump of both layers in float32."""
    folder = tmp_path_factory.mktemp("dictionaries") / "results"
    policy = write_policy(folder / "models" / "tiny", random_model("gpt_neox"), tokenizer)
    lengths = [5 + (11 * i) % 53 for i in range(61)]
    tokens = write_tokens(folder / "tokens" / "tiny.reviews", tokens_of(random_documents(lengths)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        dump(folder / "activations" / "tiny.reviews" / "mlp", policy, tokens, dtype="float32", rows_per_part=256)
    return folder


@pytest.fixture(scope="module")
def activations(results):
    return results / "activations" / "tiny.reviews" / "mlp"


@pytest.fixture
def build(results, activations, tmp_path):
    """Function of a name and settings: folder of the dictionaries of one layer."""

    def dictionaries(name="small", layer=LAYER, activations=activations, **changes):
        out = tmp_path / "results" / "dictionaries" / name
        recipe = entry(**changes)
        weights, tokens = results / "models" / "tiny" / "model", results / "tokens" / "tiny.reviews"
        build_dictionaries(recipe, recipe.settings(), layer, out, None, activations, weights, tokens)
        return out

    return dictionaries


@pytest.fixture
def trained(activations, tmp_path):
    """Function of settings: members and curves of a training without its stage."""

    def run(store=None, layer=LAYER, **changes):
        store, recipe = store or ActivationStore(activations), entry(**changes)
        mean_D, scale = centre_and_scale(store, layer, recipe.normalize, CPU)
        with Stage("dictionaries", tmp_path / "trained", recipe.settings(), {}) as stage:
            members, curves, _ = train(store, layer, recipe, mean_D, scale, stage, CPU)
        return members, curves

    return run


def random_member(channels=8, latents=12, **changes):
    """A member in the middle of its training, with biases and a batch of rows."""
    member = TiedRelu(channels, latents, entry(batch_rows=32, **changes), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(1)
    member.b_enc_F += 0.3 * torch.randn(latents, generator=generator)
    member.b_dec_D += 0.3 * torch.randn(channels, generator=generator)
    return member, torch.randn(32, channels, generator=generator)


def written_loss(member, acts_BD, W_FD, b_enc_F, b_dec_D):
    """The loss as the head of tied_relu.py writes it, its rows normalised on the way."""
    W_FD = W_FD / W_FD.norm(dim=1, keepdim=True)
    latents_BF = torch.relu(acts_BD @ W_FD.T + b_enc_F)
    return (acts_BD - (latents_BF @ W_FD + b_dec_D)).square().mean() + member.l1 * latents_BF.abs().sum(1).mean()


# --- the paper's autoencoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1", [0.0, 0.05, 2.0])
def test_the_gradients_in_closed_form_are_those_of_the_written_loss(l1):
    member, acts_BD = random_member(l1=l1)
    for batch_BD in (acts_BD, 0.5 * acts_BD.flip(0)):  # the second one meets buffers in use
        leaves = [tensor.clone().requires_grad_() for tensor in member.parameters().values()]
        written_loss(member, batch_BD, *leaves).backward()
        member.backward(batch_BD)
        for found, leaf in zip(member.parameters().values(), leaves, strict=True):
            assert leaf.grad.abs().max() > 1e-3
            torch.testing.assert_close(found.grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_the_figures_of_a_batch_are_the_terms_of_its_loss():
    member, acts_BD = random_member(l1=0.3)
    figures = member.backward(acts_BD)
    loss = written_loss(member, acts_BD, *member.parameters().values())
    assert figures["mse"] + 0.3 * figures["l1"] == pytest.approx(loss.item(), rel=1e-6)
    latents_BF = torch.relu(acts_BD @ member.W_FD.T + member.b_enc_F)
    assert figures["l0"] == pytest.approx((latents_BF > 0).sum(1).double().mean().item())


def test_rows_have_unit_length_at_the_start_and_after_every_step(trained):
    fresh = TiedRelu(8, 12, entry(), seed=0, device=CPU)
    for W_FD in (fresh.W_FD, trained(epochs=1, seeds=[0])[0][0].W_FD):
        torch.testing.assert_close(W_FD.norm(dim=1), torch.ones(len(W_FD)))


@pytest.mark.parametrize("sizes", [(32, 32), (32, 64)])
def test_dictionaries_of_different_seeds_or_widths_do_not_share_their_start(sizes):
    small, big = sizes
    one = TiedRelu(32, small, entry(), seed=0, device=CPU)
    other = TiedRelu(32, big, entry(), seed=0 if small != big else 1, device=CPU)
    assert (one.W_FD @ other.W_FD.T).max() < 0.9


def test_dictionaries_of_one_seed_and_width_start_equal():
    one, other = (TiedRelu(32, 48, entry(l1=l1), seed=3, device=CPU) for l1 in (0.1, 0.2))
    assert torch.equal(one.W_FD, other.W_FD)


def test_an_exported_dictionary_does_with_raw_rows_what_training_did_with_centred_and_scaled_ones():
    member, acts_BD = random_member()
    mean_D, scale = torch.linspace(-3, 5, 8), 0.07
    sae = member.export(mean_D, scale)
    raw_BD = acts_BD / scale + mean_D
    latents_BF = torch.relu(acts_BD @ member.W_FD.T + member.b_enc_F)
    reconstructed_BD = latents_BF @ member.W_FD + member.b_dec_D
    torch.testing.assert_close(sae.encode(raw_BD), latents_BF, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(latents_BF), reconstructed_BD / scale + mean_D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.directions(), member.W_FD)


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


# --- training ----------------------------------------------------------------------------------------------------


def test_training_lowers_the_error(trained):
    _, curves = trained(epochs=6)
    for _, curve in curves.groupby("seed"):
        assert curve.mse.tail(3).mean() < 0.6 * curve.mse.head(3).mean()


def test_a_curve_has_points_for_every_seed_up_to_the_last_step(trained, activations):
    _, curves = trained()
    steps = ActivationStore(activations).row_order(LAYER, 64, module.ROW_ORDER_SEED, 2).steps
    assert list(curves.columns) == ["seed", "step", "mse", "l1", "l0"]
    for seed in (0, 1):
        assert curves[curves.seed == seed].step.tolist() == list(range(1, steps + 1))


def test_a_stronger_l1_gives_fewer_active_latents(trained):
    ends = [trained(epochs=6, seeds=[0], l1=l1)[1].l0.iloc[-1] for l1 in (0.0, 0.02, 0.1)]
    assert ends == sorted(ends, reverse=True)
    assert ends[2] < 0.5 * ends[0]


def test_planted_directions_are_found(trained, tmp_path):
    rng = np.random.default_rng(0)
    truth_FD = normalize(torch.from_numpy(rng.normal(size=(24, 32)))).numpy()
    active_NF = rng.random((8000, 24)) < 0.06
    acts = {0: (active_NF * rng.uniform(1, 2, active_NF.shape)) @ truth_FD}
    tokens = tokens_of(random_documents([40] * 200))
    store = ActivationStore(write_store(tmp_path / "planted", tokens, acts, rows_per_part=1024))
    members, _ = trained(store, 0, epochs=40, batch_rows=128, l1=0.05, expansion=1.5, seeds=[0], learning_rate=1e-2)
    mean_D, scale = centre_and_scale(store, 0, True, CPU)
    sae = members[0].export(mean_D, scale)
    quality = held_out_quality(sae, store, 0, CPU)
    assert quality["fvu"] < 0.12
    assert quality["l0"] < 3
    assert (sae.directions().double().numpy() @ truth_FD.T).max(0).min() > 0.9


def test_a_base_compared_with_itself_has_identical_dictionaries(build, activations, results, tmp_path):
    twin = tmp_path / "results" / "activations" / "tiny.ppo.reviews" / "mlp"
    shutil.copytree(activations, twin)
    base, tuned = build("base"), build("tuned", activations=twin)
    for seed in (0, 1):
        assert (base / f"saes/seed{seed}" / WEIGHTS).read_bytes() == (tuned / f"saes/seed{seed}" / WEIGHTS).read_bytes()
    assert Manifest.read(base).metrics == Manifest.read(tuned).metrics


def test_two_seeds_in_one_job_are_bit_for_bit_those_of_two_jobs(build):
    both = build("both")
    for seed in (0, 1):
        alone = build(f"alone{seed}", seeds=[seed])
        assert (both / f"saes/seed{seed}" / WEIGHTS).read_bytes() == (alone / f"saes/seed{seed}" / WEIGHTS).read_bytes()
        assert Manifest.read(both).metrics[f"seed{seed}"] == Manifest.read(alone).metrics[f"seed{seed}"]
        curves = pd.read_parquet(both / "metrics.parquet").query("seed == @seed").reset_index(drop=True)
        pd.testing.assert_frame_equal(curves, pd.read_parquet(alone / "metrics.parquet"), check_exact=True)


def test_a_seed_has_directions_of_its_own(build):
    members = [SparseAutoencoder.load(path) for path in load_members(build()).values()]
    assert (members[0].directions() @ members[1].directions().T).diagonal().max() < 0.9


@pytest.fixture
def killed_after(monkeypatch):
    """Function of a number of steps: from then on training is killed; None: never. Counts the steps in `.taken`."""
    original = TiedRelu.backward

    def limit(steps):
        limit.taken = 0

        def backward(self, acts_BD):
            limit.taken += 1
            if steps is not None and limit.taken > steps:
                raise KeyboardInterrupt
            return original(self, acts_BD)

        monkeypatch.setattr(TiedRelu, "backward", backward)

    return limit


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_bits(build, killed_after, monkeypatch, steps):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
    monkeypatch.setattr(module, "CURVE_POINTS", 8)  # several steps per point, so that kills fall between two points
    killed_after(None)
    whole = build("whole", seeds=[0])
    total = killed_after.taken
    killed_after(steps)
    with pytest.raises(KeyboardInterrupt):
        build("killed", seeds=[0])
    killed_after(None)
    resumed = build("killed", seeds=[0])
    assert killed_after.taken == total - steps
    assert (resumed / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()
    assert digest(resumed / "saes") == digest(whole / "saes")


def test_a_training_that_was_killed_between_two_seeds_goes_on_with_both_at_the_same_step(build, killed_after, monkeypatch):
    monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
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


def test_too_few_rows_for_a_batch_are_refused_with_the_key(build, tmp_path):
    with pytest.raises(RlsaeError, match="batch_rows: 5000 rows per step"):
        build(batch_rows=5000)
    assert not list(tmp_path.rglob(MANIFEST))


def test_a_layer_that_was_not_stored_is_refused(build):
    with pytest.raises(RlsaeError, match=r"layer 7 is not in this store; it holds \[0, 1\]"):
        build(layer=7)


# --- the artifact ------------------------------------------------------------------------------------------------


def test_an_artifact_holds_a_dictionary_per_seed_the_curves_and_the_scores(build):
    out = build(expansion=1.5)
    manifest = Manifest.read(out)
    assert set(manifest.outputs) == {"saes", "metrics.parquet"}
    assert set(manifest.inputs) == {"activations/tiny.reviews/mlp", "tokens/tiny.reviews"}
    assert manifest.metrics.keys() == {"seed0", "seed1"}
    for scores in manifest.metrics.values():
        names = ["ce_recovered", "dead_share", "explained_variance", "fvu", "l0", "rows_held_out", "rows_trained"]
        assert sorted(scores) == names
        assert scores["explained_variance"] == pytest.approx(1 - scores["fvu"])
    assert {seed: SparseAutoencoder.load(path).latents for seed, path in load_members(out).items()} == {0: 48, 1: 48}


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
    config = read_json(out / "saes" / "seed4" / "cfg.json")
    expected = {"architecture": "standard", "d_in": 32, "d_sae": 64, "dtype": "float32", "normalize_activations": "none"}
    assert config.items() >= (expected | {"apply_b_dec_to_input": False}).items()
    assert config["metadata"]["hook_name"] == "gpt_neox.layers.1.mlp"
    assert config["metadata"]["model_name"] == "tiny"
    assert config["metadata"]["rlsae"]["seed"] == 4


def test_a_store_may_lie_in_any_folder(build, activations, tmp_path):
    shutil.copytree(activations, tmp_path / "dump")
    out = build("elsewhere", activations=tmp_path / "dump", seeds=[0])
    assert (out / "saes/seed0" / WEIGHTS).read_bytes() == (build("here", seeds=[0]) / "saes/seed0" / WEIGHTS).read_bytes()


def test_the_members_of_an_unfinished_artifact_are_not_read(tmp_path):
    (tmp_path / "saes" / "seed0").mkdir(parents=True)
    with pytest.raises(RlsaeError, match="is no finished artifact"):
        load_members(tmp_path)


# --- the exported format -----------------------------------------------------------------------------------------


def autoencoder(W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, **options):
    tensors = (torch.tensor(values, dtype=torch.float32) for values in (W_enc_DF, b_enc_F, W_dec_FD, b_dec_D))
    return SparseAutoencoder(*tensors, **options)


@pytest.fixture
def saved(tmp_path):
    """Folder of a dictionary of two channels and three latents."""
    sae = autoencoder([[1, 0, 2], [0, 1, 2]], [0, 0, -1], [[1, 0], [0, 1], [3, 4]], [5, 6], metadata={"note": "mine"})
    sae.save(tmp_path / "saes" / "seed0")
    return tmp_path / "saes" / "seed0"


def test_a_dictionary_reads_back_as_it_was_written(saved):
    sae = SparseAutoencoder.load(saved)
    assert sae.W_enc_DF.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert sae.b_enc_F.tolist() == [0, 0, -1]
    assert sae.W_dec_FD.tolist() == [[1, 0], [0, 1], [3, 4]]
    assert sae.b_dec_D.tolist() == [5, 6]
    assert sae.metadata["note"] == "mine"
    assert sae.latents == 3
    torch.testing.assert_close(sae.directions()[2], torch.tensor([0.6, 0.8]))


def test_a_row_is_encoded_and_decoded_as_written(saved):
    sae = SparseAutoencoder.load(saved)
    latents_BF = sae.encode(torch.tensor([[1.0, -2.0], [0.5, 0.5]]))
    assert latents_BF.tolist() == [[1, 0, 0], [0.5, 0.5, 1]]
    assert sae.decode(latents_BF).tolist() == [[6, 6], [8.5, 10.5]]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_that_lacks_a_file_is_refused_with_its_name(saved, name):
    (saved / name).unlink()
    with pytest.raises(RlsaeError, match=rf"seed0 holds no dictionary: .*{name} is missing"):
        SparseAutoencoder.load(saved)


def test_a_missing_tensor_is_named(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "b_" not in name}, saved / WEIGHTS)
    with pytest.raises(RlsaeError, match=r"sae_weights\.safetensors lacks b_dec, b_enc"):
        SparseAutoencoder.load(saved)


def test_a_foreign_architecture_is_refused_with_its_name(saved):
    config = read_json(saved / CONFIG) | {"architecture": "jumprelu"}
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(RlsaeError, match="cannot read the architecture 'jumprelu'; expected 'standard'"):
        SparseAutoencoder.load(saved)


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_rows(tmp_path):
    """A store whose held-out rows are (1, 0) and (3, 0); rows that train are far away."""
    tokens = tokens_of(random_documents([2, 1, 1]), held_out=[False, True, True])
    acts = np.array([[90, -70], [-80, 60], [1, 0], [3, 0]], float)
    return ActivationStore(write_store(tmp_path / "two-rows", tokens, {0: acts}))


def test_the_unexplained_share_of_variance_is_that_worked_out_by_hand(two_rows):
    # f = (ReLU(x0 - 1), ReLU(-x0)) = (0, 0) and (2, 0); x̂ = (0, 0) and (2, 0), each 1 off; the rows lie 1 from their mean.
    sae = autoencoder([[1, -1], [0, 0]], [-1, 0], [[1, 0], [0, 1]], [0, 0])
    assert held_out_quality(sae, two_rows, 0, CPU) == {
        "fvu": pytest.approx((1 + 1) / (1 + 1)),
        "explained_variance": pytest.approx(0),
        "l0": 0.5,
        "dead_share": 0.5,
        "rows_held_out": 2,
    }


@pytest.mark.parametrize(("b_dec", "fvu"), [([0, 0], 5.0), ([2, 0], 1.0), ([2, 1], 2.0)])
def test_a_constant_is_scored_by_its_distance_from_the_mean(two_rows, b_dec, fvu):
    assert held_out_quality(autoencoder([[0], [0]], [0], [[1, 0]], b_dec), two_rows, 0, CPU)["fvu"] == pytest.approx(fvu)


def test_a_perfect_dictionary_leaves_nothing_unexplained(activations):
    quality = held_out_quality(identity(32), ActivationStore(activations), LAYER, CPU)
    assert quality["fvu"] == 0
    assert quality["explained_variance"] == 1
    assert quality["l0"] == 32


def identity(channels):
    """ReLU(x) - ReLU(-x) = x."""
    eye = np.eye(channels)
    return autoencoder(np.hstack([eye, -eye]), np.zeros(2 * channels), np.vstack([eye, -eye]), np.zeros(channels))


def zeros(channels):
    shape = np.zeros((channels, channels))
    return autoencoder(shape, shape[0], shape, shape[0])


def recovered(results, *saes, layer=LAYER, hook=HOOK):
    weights, tokens = results / "models" / "tiny" / "model", results / "tokens" / "tiny.reviews"
    return ce_recovered(list(saes), weights, tokens, layer, hook, CPU)


@pytest.mark.parametrize("hook", ["mlp", "attention", "block"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_perfect_dictionary_recovers_all_of_the_loss_and_zeros_none_of_it(results, hook, layer):
    assert recovered(results, identity(32), zeros(32), layer=layer, hook=hook) == [pytest.approx(1, abs=1e-6), 0]


def test_the_loss_recovered_is_that_of_the_documents_one_by_one(results, random_model, activations):
    rows = torch.from_numpy(rows_of(activations, LAYER))
    _, _, directions_DD = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    half_DF = directions_DD[:8].T
    sae = SparseAutoencoder(
        torch.cat([half_DF, -half_DF], 1), torch.zeros(16), torch.cat([half_DF.T, -half_DF.T]), torch.zeros(32)
    )
    model, tokens = random_model("gpt_neox"), Tokens.open(results / "tokens" / "tiny.reviews")
    edits = [lambda acts: acts, lambda acts: acts @ half_DF @ half_DF.T, torch.zeros_like]
    losses = []
    for edit in edits:
        mlp = model.get_submodule("gpt_neox.layers.1.mlp")
        handle = mlp.register_forward_hook(lambda module, arguments, output, edit=edit: edit(output))
        total = 0.0
        for document in np.flatnonzero(tokens.held_out):
            ids = torch.from_numpy(tokens.ids(document).astype(np.int64))[None]
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        handle.remove()
        losses.append(total)
    clean, reconstructed, zeroed = losses
    expected = (zeroed - reconstructed) / (zeroed - clean)
    assert abs(1 - expected) > 0.01
    assert recovered(results, sae) == [pytest.approx(expected, abs=1e-4)]


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


def test_directions_of_a_dead_latent_are_still_of_unit_length():
    member = TiedRelu(8, 12, entry(), seed=0, device=CPU)
    torch.testing.assert_close(member.export(torch.zeros(8), 0.01).directions(), normalize(member.W_FD, dim=1))
