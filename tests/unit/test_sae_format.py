"""Dictionaries on disk: the format of SAELens, and folders of other libraries."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import read_json
from small_dictionaries import DICTIONARY_LEARNING, autoencoder, random_rows

from rlsae.errors import RlsaeError
from rlsae.sae.activation_functions import Gated, JumpReLU, TopK
from rlsae.sae.dictionary import CONFIG, SPARSITY, WEIGHTS, SparseAutoencoder
from rlsae.sae.external import load_external

CHANNELS, LATENTS = 4, 6


def random_sae(activation=None):
    generator = torch.Generator().manual_seed(0)
    shapes = [(CHANNELS, LATENTS), (LATENTS,), (LATENTS, CHANNELS), (CHANNELS,)]
    tensors = (torch.randn(shape, generator=generator) for shape in shapes)
    return SparseAutoencoder(*tensors, **({"activation": activation} if activation else {}))


def kinds():
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.randn(LATENTS, generator=generator) for _ in range(2)]
    return {
        "standard": random_sae(),
        "topk": random_sae(TopK(2)),
        "jumprelu": random_sae(JumpReLU(numbers[0].abs())),
        "gated": random_sae(Gated(numbers[0], numbers[1])),
    }


EXTRA = {"standard": {"b_enc"}, "topk": {"b_enc"}, "jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}


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


# --- kinds of encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds())
def test_each_kind_reads_back_as_it_was_written(kind, tmp_path):
    sae, acts_BD = kinds()[kind], random_rows(64, CHANNELS)
    sae.save(tmp_path / "sae")
    read = SparseAutoencoder.load(tmp_path / "sae")
    assert read.activation.architecture == read_json(tmp_path / "sae" / CONFIG)["architecture"] == kind
    assert set(load_file(tmp_path / "sae" / WEIGHTS)) == {"W_enc", "W_dec", "b_dec"} | EXTRA[kind]
    torch.testing.assert_close(read.encode(acts_BD), sae.encode(acts_BD))
    assert torch.count_nonzero(sae.encode(acts_BD))
    assert sae.to(torch.device("cpu")).encode(acts_BD).equal(sae.encode(acts_BD))


def test_a_topk_keeps_the_k_largest_of_each_row():
    sae = autoencoder([[1, 2, 3, -4]], [0, 0, 0, 0], [[1], [1], [1], [1]], [0], activation=TopK(2))
    assert sae.encode(torch.tensor([[1.0], [-1.0]])).tolist() == [[0, 2, 3, 0], [0, 0, 0, 4]]


def test_a_jumprelu_keeps_what_lies_above_the_threshold():
    sae = autoencoder([[1, 1, 1]], [0, 0, 0], [[1], [1], [1]], [0], activation=JumpReLU(torch.tensor([0.5, 1.0, 2.0])))
    assert sae.encode(torch.tensor([[1.0]])).tolist() == [[1, 0, 0]]


def test_a_gated_one_decides_by_its_gate_and_measures_by_its_magnitude():
    # gate = x + b_gate = x - 1; magnitude = ReLU(2 x + b_mag), b_mag = shift + 2 b_gate.
    activation = Gated(torch.tensor([2.0]).log(), torch.tensor([5.0]))
    sae = autoencoder([[1]], [-1], [[1]], [0], activation=activation)
    assert sae.encode(torch.tensor([[0.5], [3.0]])).flatten().tolist() == pytest.approx([0, 2 * 3 + 3])
    assert activation.tensors(sae.b_enc_F)["b_mag"].tolist() == pytest.approx([3])


def test_densities_are_written_as_saelens_reads_them(tmp_path):
    random_sae().save(tmp_path / "sae", torch.tensor([0.0, 1.0, 0.1, 0.01, 0.5, 0.25], dtype=torch.float64))
    sparsity = load_file(tmp_path / "sae" / SPARSITY)["sparsity"]
    torch.testing.assert_close(sparsity[:4], torch.tensor([-10.0, 0.0, -1.0, -2.0]))


@pytest.mark.parametrize("kind", kinds())
def test_a_missing_tensor_of_any_kind_is_named(kind, tmp_path):
    kinds()[kind].save(tmp_path / "sae")
    tensors = load_file(tmp_path / "sae" / WEIGHTS)
    for name in EXTRA[kind]:
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, tmp_path / "sae" / WEIGHTS)
        with pytest.raises(RlsaeError, match=rf"sae_weights\.safetensors lacks {name}$"):
            SparseAutoencoder.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "standard",
            {"architecture": "temporal"},
            "cannot read the architecture 'temporal'; expected one of 'standard', 'topk'",
        ),
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm', .* fold it"),
        ("topk", {"k": 7}, "k is 7, more than its 6 latents"),
        ("topk", {"k": None}, "expected the number of active latents under k, found None"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, kind, changes, message):
    kinds()[kind].save(tmp_path / "sae")
    config = read_json(tmp_path / "sae" / CONFIG) | changes
    (tmp_path / "sae" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(RlsaeError, match=message):
        SparseAutoencoder.load(tmp_path / "sae")


def test_tensors_that_do_not_fit_together_are_refused_with_their_shapes(tmp_path):
    sae = random_sae()
    SparseAutoencoder(sae.W_enc_DF[:, :5], sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D).save(tmp_path / "sae")
    with pytest.raises(RlsaeError, match=r"W_enc has the shape \(4, 5\); the decoder's \(6, 4\) asks for \(4, 6\)"):
        SparseAutoencoder.load(tmp_path / "sae")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_named(tmp_path, name):
    random_sae().save(tmp_path / "sae")
    (tmp_path / "sae" / name).write_bytes(b"{]")
    with pytest.raises(RlsaeError, match=rf"{name} is no"):
        SparseAutoencoder.load(tmp_path / "sae")


@pytest.mark.parametrize("kind", kinds())
def test_a_dictionary_of_saelens_that_subtracts_the_decoders_bias_is_read_as_the_same_function(kind, tmp_path):
    sae, acts_BD = kinds()[kind], random_rows(64, CHANNELS)
    sae.save(tmp_path / "sae")
    config = read_json(tmp_path / "sae" / CONFIG) | {"apply_b_dec_to_input": True}
    (tmp_path / "sae" / CONFIG).write_text(json.dumps(config))
    torch.testing.assert_close(load_external(tmp_path / "sae").encode(acts_BD + sae.b_dec_D), sae.encode(acts_BD))


# --- folders of other libraries ----------------------------------------------------------------------------------


def write_dictionary_learning(folder, kind, state, **trainer):
    folder.mkdir()
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, **trainer}}))
    return folder


def linear_state(sae):
    return {"encoder.weight": sae.W_enc_DF.T, "encoder.bias": sae.b_enc_F, "decoder.weight": sae.W_dec_FD.T}


def plain_state(sae):
    return {"W_enc": sae.W_enc_DF, "b_enc": sae.b_enc_F, "W_dec": sae.W_dec_FD, "b_dec": sae.b_dec_D}


def dictionary_learning(kind):
    """State, trainer and activation of a class of dictionary_learning."""
    sae, b_dec_D, threshold = random_sae(), random_sae().b_dec_D, torch.tensor(0.3)
    ones_F = torch.ones(LATENTS)
    gated = linear_state(sae) | {"gate_bias": sae.b_enc_F, "mag_bias": ones_F, "r_mag": 0.1 * ones_F, "decoder_bias": b_dec_D}
    threshold_F = torch.linspace(0.1, 0.9, LATENTS)
    return {
        "AutoEncoder": (linear_state(sae) | {"bias": b_dec_D}, torch.relu, {}),
        "AutoEncoderNew": (linear_state(sae) | {"decoder.bias": b_dec_D}, torch.relu, {}),
        "AutoEncoderTopK": (
            linear_state(sae) | {"b_dec": b_dec_D, "k": torch.tensor(2), "threshold": torch.tensor(-1.0)},
            TopK(2),
            {"k": 2},
        ),
        "BatchTopKSAE": (linear_state(sae) | {"b_dec": b_dec_D, "threshold": threshold}, JumpReLU(threshold.expand(6)), {}),
        "MatryoshkaBatchTopKSAE": (plain_state(sae) | {"threshold": threshold}, JumpReLU(threshold.expand(6)), {}),
        "JumpReluAutoEncoder": (plain_state(sae) | {"threshold": threshold_F}, JumpReLU(threshold_F), {}),
        "GatedAutoEncoder": (gated, Gated(0.1 * ones_F, ones_F - (0.1 * ones_F).exp() * sae.b_enc_F), {}),
    }[kind]


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_a_dictionary_of_dictionary_learning_is_read_as_the_function_that_it_is_there(kind, tmp_path):
    state, activation, trainer = dictionary_learning(kind)
    found = load_external(write_dictionary_learning(tmp_path / "dl", kind, state, **trainer))
    sae, acts_BD = random_sae(), random_rows(64, CHANNELS)
    read_BD = acts_BD if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else acts_BD - sae.b_dec_D
    latents_BF = activation(read_BD @ sae.W_enc_DF + sae.b_enc_F)
    torch.testing.assert_close(found.encode(acts_BD), latents_BF, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.decode(latents_BF), latents_BF @ sae.W_dec_FD + sae.b_dec_D)


def test_a_dictionary_of_sparsify_is_read_as_the_function_that_it_is_there(tmp_path):
    sae, acts_BD = random_sae(TopK(2)), random_rows(64, CHANNELS)
    tensors = linear_state(sae) | {"W_dec": sae.W_dec_FD, "b_dec": sae.b_dec_D}
    del tensors["decoder.weight"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"k": 2, "activation": "topk", "d_in": CHANNELS}))
    torch.testing.assert_close(load_external(tmp_path).encode(acts_BD + sae.b_dec_D), sae.encode(acts_BD), rtol=1e-4, atol=1e-5)


def test_a_folder_of_no_known_library_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(RlsaeError, match=r"holds no autoencoder; expected cfg\.json and sae_weights\.safetensors \(SAELens\)"):
        load_external(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("NoiseAutoEncoder", {}, "cannot read the class 'NoiseAutoEncoder'; expected one of 'AutoEncoder'"),
        ("AutoEncoder", {"bias": None}, "lacks bias"),
        ("AutoEncoderTopK", {}, "expected the number of active latents under k"),
    ],
)
def test_what_cannot_be_read_of_dictionary_learning_is_named(tmp_path, kind, change, message):
    state = dictionary_learning(kind if kind != "NoiseAutoEncoder" else "AutoEncoder")[0] | change
    folder = write_dictionary_learning(tmp_path / "dl", kind, {k: v for k, v in state.items() if v is not None})
    with pytest.raises(RlsaeError, match=message):
        load_external(folder)


class Surprise:
    """What a pickle may run."""

    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_is_more_than_tensors_is_not_run(tmp_path, capsys):
    folder = write_dictionary_learning(tmp_path / "dl", "AutoEncoder", {"bias": Surprise()})
    with pytest.raises(RlsaeError, match=r"ae\.pt cannot be read as plain tensors"):
        load_external(folder)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["skip_connection", "transcode"])
def test_what_sparsify_has_beyond_autoencoders_is_refused(tmp_path, key):
    save_file({"W_dec": torch.zeros(1)}, tmp_path / "sae.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"k": 2, key: True}))
    with pytest.raises(RlsaeError, match=f"{key} is True; only False can be read"):
        load_external(tmp_path)
