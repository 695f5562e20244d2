"""Scores of dictionaries on held-out rows, and in the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_artifacts import random_documents, rows_of, tokens_of, write_store
from small_dictionaries import CPU, autoencoder, random_rows
from small_results import write_results

from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.evaluate import held_out_quality, recovered

HOOK = "mlp"
LAYER = 1


@pytest.fixture(scope="module")
def results(random_model, tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return write_results(tmp_path_factory.mktemp("scores") / "results", random_model("gpt_neox"), tokenizer)


@pytest.fixture(scope="module")
def activations(results):
    return results / "activations" / "tiny.reviews" / "mlp"


def store_of(folder, rows):
    """A store of these held-out rows, after two that train and are far away."""
    rows = np.asarray(rows, float)
    tokens = tokens_of(random_documents([2, len(rows)]), held_out=[False, True])
    far = np.full((2, rows.shape[1]), 70.0) * [[1], [-1]]
    return ActivationStore(write_store(folder / "rows", tokens, {0: np.concatenate([far, rows])}))


def scores_of(sae, store, layer=0):
    return held_out_quality(sae, store, layer, CPU)[0]


def constant(value_D, latents=1):
    """x̂ is the same at every row."""
    channels = len(value_D)
    return autoencoder(np.zeros((channels, latents)), np.zeros(latents), np.zeros((latents, channels)), value_D)


def identity(channels):
    """ReLU(x) - ReLU(-x) = x."""
    eye = np.eye(channels)
    return autoencoder(np.hstack([eye, -eye]), np.zeros(2 * channels), np.vstack([eye, -eye]), np.zeros(channels))


@pytest.fixture
def two_rows(tmp_path):
    """Held-out rows (1, 0) and (3, 0)."""
    return store_of(tmp_path, [[1, 0], [3, 0]])


def test_all_scores_are_those_worked_out_by_hand(two_rows):
    # f = (ReLU(x0 - 1), ReLU(-x0)) = (0, 0) and (2, 0); x̂ = (0, 0) and (2, 0), each 1 off; the rows lie 1 from their mean.
    sae = autoencoder([[1, -1], [0, 0]], [-1, 0], [[1, 0], [0, 1]], [0, 0])
    scores, density_F = held_out_quality(sae, two_rows, 0, CPU)
    assert scores == {
        "fvu": pytest.approx((1 + 1) / (1 + 1)),
        "explained_variance": pytest.approx(0),
        "l0": 0.5,
        "l1": 1.0,
        "cosine": pytest.approx((0 + 1) / 2),
        # x̂ - mean = (-2, 0) and (0, 0); x - mean = (-1, 0) and (1, 0).
        "shrinkage": pytest.approx(1 - 4 / 2),
        "dead_share": 0.5,
        "dense_share": 0.5,
        "outlier_share": 0.0,
        "rows_held_out": 2,
    }
    assert density_F.tolist() == [0.5, 0.0]


def test_variance_explained_is_that_of_a_published_example(tmp_path):
    # Rows (2, 0) and (0, 4) reconstructed as (2, 1) and (0, 3): errors 1 + 1, variance 1 + 1 + 4 + 4.
    store = store_of(tmp_path, [[2, 0], [0, 4]])
    sae = autoencoder([[1, 0], [0, 1]], [0, 0], [[1, 0], [0, 0.5]], [0, 1])
    assert scores_of(sae, store)["explained_variance"] == pytest.approx(0.8)


@pytest.mark.parametrize(("b_dec", "fvu"), [([0, 0], 5.0), ([2, 0], 1.0), ([2, 1], 2.0)])
def test_a_constant_is_scored_by_its_distance_from_the_mean(two_rows, b_dec, fvu):
    assert scores_of(constant(b_dec), two_rows)["fvu"] == pytest.approx(fvu)


def test_shrinkage_is_the_share_by_which_deviations_from_the_mean_are_too_small(tmp_path):
    rows = random_rows(500, 3).numpy() + np.array([5, -7, 100])
    store, mean_D = store_of(tmp_path, rows), rows.mean(0)
    for kept in (1.0, 0.75, 1.25):
        eye = np.eye(3)
        sae = autoencoder(np.hstack([eye, -eye]), np.zeros(6), kept * np.vstack([eye, -eye]), (1 - kept) * mean_D)
        assert scores_of(sae, store)["shrinkage"] == pytest.approx(1 - kept, abs=1e-4)


def test_rows_far_longer_than_the_median_count_as_outliers(tmp_path):
    rows = np.ones((50, 2))
    rows[:4] = [[11, 11], [-9, 9], [9.9, 9.9], [0, 15]]
    assert scores_of(constant([0, 0]), store_of(tmp_path, rows))["outlier_share"] == pytest.approx(2 / 50)


def test_latents_that_fire_at_more_than_a_tenth_of_the_rows_are_dense(tmp_path):
    rows = np.zeros((20, 3))
    rows[:2, 0], rows[:3, 1], rows[:20, 2] = 1, 1, 1
    scores, density_F = held_out_quality(autoencoder(np.eye(3), [0] * 3, np.eye(3), [0] * 3), store_of(tmp_path, rows), 0, CPU)
    assert density_F.tolist() == [0.1, 0.15, 1.0]
    assert scores["dense_share"] == pytest.approx(2 / 3)


def test_a_perfect_dictionary_leaves_nothing_unexplained(activations):
    scores = scores_of(identity(32), ActivationStore(activations), LAYER)
    assert scores["fvu"] == 0
    assert scores["explained_variance"] == 1
    assert scores["l0"] == 32
    assert scores["cosine"] == pytest.approx(1)
    assert scores["shrinkage"] == pytest.approx(0, abs=1e-12)


# --- in the model ------------------------------------------------------------------------------------------------


def zeros(channels):
    return constant(np.zeros(channels), channels)


def in_the_model(results, *saes, layer=LAYER, hook=HOOK):
    weights, tokens = results / "models" / "tiny" / "model", results / "tokens" / "tiny.reviews"
    return recovered(list(saes), weights, tokens, layer, hook, CPU)


@pytest.mark.parametrize("hook", ["mlp", "attention", "block"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_perfect_dictionary_recovers_all_of_loss_and_distribution_and_zeros_nothing(results, hook, layer):
    perfect, nothing = in_the_model(results, identity(32), zeros(32), layer=layer, hook=hook)
    assert perfect == {"ce_recovered": pytest.approx(1, abs=1e-6), "kl_recovered": pytest.approx(1, abs=1e-6)}
    assert nothing == {"ce_recovered": 0, "kl_recovered": 0}


def test_what_is_recovered_is_that_of_the_documents_one_by_one(results, random_model, activations):
    rows = torch.from_numpy(rows_of(activations, LAYER))
    _, _, directions_DD = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    half_DF = directions_DD[:8].T
    sae = SparseAutoencoder(
        torch.cat([half_DF, -half_DF], 1), torch.zeros(16), torch.cat([half_DF.T, -half_DF.T]), torch.zeros(32)
    )
    model, tokens = random_model("gpt_neox"), Tokens.open(results / "tokens" / "tiny.reviews")
    edits = [lambda acts: acts, lambda acts: acts @ half_DF @ half_DF.T, torch.zeros_like]
    losses, log_ps = [], []
    for edit in edits:
        mlp = model.get_submodule("gpt_neox.layers.1.mlp")
        handle = mlp.register_forward_hook(lambda module, arguments, output, edit=edit: edit(output))
        total, log_p = 0.0, []
        for document in np.flatnonzero(tokens.held_out):
            ids = torch.from_numpy(tokens.ids(document).astype(np.int64))[None]
            with torch.no_grad():
                done = model(input_ids=ids, labels=ids)
            total += done.loss.item() * (ids.shape[1] - 1)
            log_p.append(done.logits[0, :-1].double().log_softmax(1))
        handle.remove()
        losses.append(total)
        log_ps.append(torch.cat(log_p))
    clean, reconstructed, zeroed = losses
    ce = (zeroed - reconstructed) / (zeroed - clean)
    kl_reconstructed, kl_zeroed = ((log_ps[0].exp() * (log_ps[0] - other)).sum() for other in log_ps[1:])
    assert abs(1 - ce) > 0.01
    (found,) = in_the_model(results, sae)
    assert found["ce_recovered"] == pytest.approx(ce, abs=1e-4)
    assert found["kl_recovered"] == pytest.approx(1 - (kl_reconstructed / kl_zeroed).item(), abs=1e-4)
