"""What the dictionaries of base and tuned share: their start, their rows, and what they go on from."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from small_artifacts import random_documents, tokens_of, write_store
from small_dictionaries import CPU, ENTRIES, entry_of
from small_results import LAYER, builder, weights_of, write_results

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import Manifest
from rlsae.errors import RlsaeError
from rlsae.sae import train as module
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import new_members, rows_digest


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def results(random_model, tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        return write_results(tmp_path_factory.mktemp("pairs") / "results", random_model("gpt_neox"), tokenizer)


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
def build(results, tmp_path):
    return builder(results, tmp_path)


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
    with pytest.raises(RlsaeError, match="start: from_base needs the dictionaries"):
        build(recipe=entry_of(start="from_base", continues="trained"))
