"""How far activations moved: against direct computation in memory, a second implementation of CKA, and known changes."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from small_artifacts import random_documents, tiny_model, tokens_of, write_store
from small_models import by_measure, perturbed

from rlsae.activations.extract import Capture
from rlsae.activations.store import ActivationStore
from rlsae.divergence import activations as module
from rlsae.divergence.activations import activation_divergence
from rlsae.divergence.table import layer_table
from rlsae.errors import RlsaeError

LAYERS = 3
TOKENS = tokens_of(random_documents([5, 17, 3, 40, 9, 28, 31, 12, 2, 20]))
RNG = np.random.default_rng(0)
# Means that differ between channels: what is not centred shows.
ACTS = {layer: RNG.normal(np.arange(8), 1 + layer, (int(TOKENS.start[-1]), 8)).astype("f4") for layer in range(LAYERS)}
EXACT = ["activation_mean_shift", "activation_residual_shift", "activation_covariance_shift", "activation_l2_relative"]


def shifted(scales):
    """The rows of the base, moved by noise of another size in each layer."""
    rng = np.random.default_rng(1)
    return {
        layer: (ACTS[layer] + scale * rng.normal(0.5, 1, ACTS[layer].shape)).astype("f4") for layer, scale in enumerate(scales)
    }


@pytest.fixture
def surveys(tmp_path):
    """Function of rows and tokens: the base's survey and another one."""

    def stores(acts, tokens=TOKENS, base=ACTS):
        write_store(tmp_path / "base", TOKENS, base)
        write_store(tmp_path / "tuned", tokens, acts)
        return ActivationStore(tmp_path / "base"), ActivationStore(tmp_path / "tuned")

    return stores


def in_memory(before, after):
    """Every measure by its definition, from whole arrays."""
    b, t = before.astype(np.float64), after.astype(np.float64)
    shift = t - b
    scale = np.sqrt((b**2).sum(1).mean())
    norms = np.linalg.norm(b, axis=1), np.linalg.norm(t, axis=1)
    return {
        "activation_l2_relative": np.linalg.norm(shift, axis=1).sum() / norms[0].sum(),
        "activation_cosine": 1 - ((b * t).sum(1) / (norms[0] * norms[1])).mean(),
        "activation_cka": 1 - cka_by_distances(b, t),
        "activation_mean_shift": np.linalg.norm(shift.mean(0)) / scale,
        "activation_residual_shift": np.sqrt(((shift - shift.mean(0)) ** 2).sum(1).mean()) / scale,
        "activation_covariance_shift": np.linalg.norm(np.cov(t.T) - np.cov(b.T)) / np.linalg.norm(np.cov(b.T)),
    }


def cka_by_distances(b, t):
    """Linear CKA from doubly centred squared distances between rows: no product of channels, unlike the code tested."""

    def gram(rows):
        centring = np.eye(len(rows)) - 1 / len(rows)
        return -0.5 * centring @ squareform(pdist(rows, "sqeuclidean")) @ centring

    one, other = gram(b), gram(t)
    return (one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum())


def test_every_measure_equals_its_definition_in_memory(surveys):
    tuned = shifted([0.1, 1.0, 0.5])
    found = by_measure(activation_divergence(*surveys(tuned)))
    for layer in range(LAYERS):
        expected = in_memory(ACTS[layer], tuned[layer])
        assert found.keys() == expected.keys()
        for measure, value in expected.items():
            assert found[measure][layer] == pytest.approx(value, rel=1e-6), measure


def test_the_measures_do_not_depend_on_how_many_rows_are_in_memory(surveys, monkeypatch):
    stores = surveys(shifted([0.1, 1.0, 0.5]))
    whole = by_measure(activation_divergence(*stores))
    monkeypatch.setattr(module, "ROWS", 13)
    for measure, values in by_measure(activation_divergence(*stores)).items():
        assert values == pytest.approx(whole[measure], rel=1e-9)


def test_memory_grows_neither_with_rows_nor_with_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 256)
    monkeypatch.setattr(module, "bootstrap_weights", lambda groups, *_: np.ones((5, groups)))
    peaks = {}
    for documents, layers in ((256, 1), (1024, 1), (256, 4)):
        tokens = tokens_of(random_documents([8] * documents))
        rows_ND = RNG.normal(size=(8 * documents, 64))
        stores = [
            ActivationStore(
                write_store(tmp_path / f"{documents}-{layers}-{n}", tokens, dict.fromkeys(range(layers), rows_ND + n))
            )
            for n in (0, 1)
        ]
        tracemalloc.start()
        activation_divergence(*stores)
        peaks[documents, layers] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1024, 1] < 1.1 * peaks[256, 1]
    assert peaks[256, 4] < 1.1 * peaks[256, 1]


def test_equal_activations_differ_by_exactly_nothing_in_every_measure_and_resample(surveys):
    for measured in activation_divergence(*surveys(ACTS)):
        assert measured.values_L.tolist() == [0.0] * LAYERS, measured.measure
        assert not measured.resampled_RL.any(), measured.measure


def test_rows_of_zeros_are_equal_to_themselves(surveys):
    nothing = {layer: np.zeros_like(rows) for layer, rows in ACTS.items()}
    for measured in activation_divergence(*surveys(nothing, base=nothing)):
        assert not measured.values_L.any(), measured.measure


def test_one_vector_added_to_all_rows_is_a_shift_of_the_mean_and_nothing_beyond(surveys):
    vector = np.linspace(-1, 1, 8, dtype="f4")
    found = by_measure(activation_divergence(*surveys({layer: rows + vector for layer, rows in ACTS.items()})))
    for layer in range(LAYERS):
        scale = np.sqrt((ACTS[layer].astype(float) ** 2).sum(1).mean())
        assert found["activation_mean_shift"][layer] == pytest.approx(np.linalg.norm(vector) / scale, rel=1e-5)
        for measure in ("activation_residual_shift", "activation_covariance_shift", "activation_cka"):
            assert found[measure][layer] == pytest.approx(0, abs=1e-5), measure


def test_cka_is_blind_to_rotation_and_scale_and_the_others_are_not(surveys):
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    found = by_measure(activation_divergence(*surveys({n: (3 * rows @ rotation).astype("f4") for n, rows in ACTS.items()})))
    assert max(found["activation_cka"]) < 1e-6
    assert all(min(found[measure]) > 0.1 for measure in [*EXACT, "activation_cosine"])


def test_the_squares_of_mean_shift_and_residual_shift_add_up_to_the_whole_shift(surveys):
    tuned = shifted([0.1, 1.0, 0.5])
    found = by_measure(activation_divergence(*surveys(tuned)))
    for layer in range(LAYERS):
        shift = (tuned[layer].astype(float) - ACTS[layer]) ** 2
        whole = shift.sum(1).mean() / (ACTS[layer].astype(float) ** 2).sum(1).mean()
        parts = [found[f"activation_{part}_shift"][layer] for part in ("mean", "residual")]
        assert parts[0] ** 2 + parts[1] ** 2 == pytest.approx(whole, rel=1e-9)


def test_documents_and_not_rows_are_resampled(surveys):
    # One document moved: resamples hold it 0, 1, 2... times, so that whole resamples show no shift at all.
    tuned = {layer: rows.copy() for layer, rows in ACTS.items()}
    tuned[0][TOKENS.start[3] : TOKENS.start[4]] += 5
    measured = {m.measure: m for m in activation_divergence(*surveys(tuned))}
    for measure in ("activation_l2_relative", "activation_covariance_shift"):
        nothing = np.mean(measured[measure].resampled_RL[:, 0] == 0)
        assert nothing == pytest.approx((1 - 1 / 10) ** 10, abs=0.08), measure


def test_every_interval_holds_its_value_though_norms_grow_when_they_are_resampled(surveys):
    table = layer_table(activation_divergence(*surveys(shifted([0.1, 1.0, 0.5]))))
    assert ((table.ci_low < table.value) & (table.value < table.ci_high)).all()
    assert (table.ci_low >= 0).all()


def test_the_component_is_the_hook_of_the_surveys(surveys):
    assert {m.component for m in activation_divergence(*surveys(ACTS))} == {"mlp"}


# --- a planted change of the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("planted", range(LAYERS))
def test_a_planted_layer_moved_and_those_before_it_did_not(tmp_path, family, planted):
    base = tiny_model(family)
    tokens = tokens_of(random_documents([8, 12, 20, 9], vocabulary=64))
    stores = []
    for name, model in (("base", base), ("tuned", perturbed(base, planted))):
        capture = Capture(copy.deepcopy(model), list(range(LAYERS)), "mlp", "float32")
        rows = capture.rows(tokens, 0, int(tokens.start[-1]))
        stores.append(ActivationStore(write_store(tmp_path / name, tokens, rows)))
    for measured in activation_divergence(*stores):
        assert not measured.values_L[:planted].any(), measured.measure
        assert measured.values_L[planted] > 1e-6, measured.measure
        assert int(np.argmax(measured.values_L[: planted + 1])) == planted


# --- what cannot be compared -------------------------------------------------------------------------------------


def test_surveys_of_other_tokens_are_refused(surveys):
    with pytest.raises(RlsaeError, match=r"holds other tokens than .*; dump both policies with the same tokens and rows"):
        activation_divergence(*surveys(ACTS, tokens_of(random_documents(np.diff(TOKENS.start), seed=1))))


def test_surveys_of_other_documents_are_refused(surveys):
    moved = tokens_of([*np.split(TOKENS.token, [7])], held_out=[False, False])
    with pytest.raises(RlsaeError, match="holds other tokens than"):
        activation_divergence(*surveys(ACTS, moved))


def test_surveys_of_other_layers_are_refused_with_both_lists(surveys):
    with pytest.raises(RlsaeError, match=r"different layers: \[0, 1, 2\] of the base, \[0, 1\] of the tuned model"):
        activation_divergence(*surveys({layer: ACTS[layer] for layer in (0, 1)}))


def test_surveys_of_other_widths_are_refused_with_both_widths(surveys):
    with pytest.raises(RlsaeError, match="layer 0: 8 channels in the base's survey, 4 in the tuned model's"):
        activation_divergence(*surveys({layer: rows[:, :4] for layer, rows in ACTS.items()}))
