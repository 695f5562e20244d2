"""How far each layer moved: the three measures, the choice of layers, and what cannot be compared."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import finish, random_documents, read_json, tiny_model, tokens_of, write_store

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import Manifest
from rlsae.divergence import MEASURES, activation_divergence, build_divergence, weight_divergence
from rlsae.errors import RlsaeError
from rlsae.models import blocks, component

LAYERS = 3
TOKENS = tokens_of(random_documents([5, 17, 3, 40, 9, 28, 31, 12, 2, 20]))
RNG = np.random.default_rng(0)
ACTS = {layer: RNG.normal(0, 1 + layer, (int(TOKENS.start[-1]), 8)) for layer in range(LAYERS)}


def shifted(scales):
    """The rows of the base, moved by noise of another size in each layer."""
    rng = np.random.default_rng(1)
    return {layer: ACTS[layer] + scale * rng.normal(size=ACTS[layer].shape) for layer, scale in enumerate(scales)}


def perturbed(model, layer, hook="mlp", scale=0.1, seed=1):
    """A copy of a model with noise on one part of one layer."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in component(blocks(changed)[layer], hook).parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return changed


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2"])
def base(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def neox():
    return tiny_model("gpt_neox")


@pytest.fixture
def written(tmp_path):
    """Function of a name and a model: folder of its weights."""

    def save(name, model, **options):
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def measure(tmp_path, neox):
    """Function of settings: folder of the divergence artifact of two models and their surveys."""
    count = iter(range(100))

    def divergence(layers, tuned=neox, acts=ACTS, same_as=None, base=neox):
        folder = tmp_path / str(next(count))
        policies, surveys = [], []
        for name, model, rows in [("tiny", base, ACTS), ("tiny.ppo", tuned, acts)]:
            model.save_pretrained(folder / "models" / name / "model")
            policies.append(finish(folder / "models" / name, "models"))
            surveys.append(write_store(folder / "activations" / name / "survey", TOKENS, rows))
        weights = [policy / "model" for policy in policies]
        build_divergence({"layers": layers}, folder / "divergence" / "a", None, *policies, *weights, *surveys, same_as)
        return folder / "divergence" / "a"

    return divergence


def values(folder, measure):
    table = pd.read_parquet(folder / "layers.parquet")
    return table[table.measure == measure].sort_values("layer").value.tolist()


def chosen(folder):
    return read_json(folder / "chosen.json")


# --- weights -----------------------------------------------------------------------------------------------------


def test_equal_weights_do_not_differ_in_any_layer(base, written):
    assert weight_divergence(written("base", base), written("tuned", base)) == ([0.0] * LAYERS, [0.0] * LAYERS)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_layer_whose_mlp_changed_is_furthest_by_both_measures_and_the_others_did_not_move(base, written, layer):
    found = weight_divergence(written("base", base), written("tuned", perturbed(base, layer)))
    for table in found:
        assert table[layer] > 0.01
        assert [value for number, value in enumerate(table) if number != layer] == [0.0] * (LAYERS - 1)


def test_the_measures_are_the_sums_of_their_definitions(base, written):
    tuned = base
    for layer, scale in enumerate([0.02, 0.3, 0.1]):
        tuned = perturbed(perturbed(tuned, layer, "mlp", scale), layer, "attention", scale / 2)
    sums, relative = weight_divergence(written("base", base), written("tuned", tuned))
    for layer in range(LAYERS):
        before, after = (list(blocks(model)[layer].parameters()) for model in (base, tuned))
        shifts = [(b.double() - a.double()).norm() for a, b in zip(before, after, strict=True)]
        assert sums[layer] == pytest.approx(sum(shifts).item(), rel=1e-6)
        sizes = torch.stack([parameter.double().norm() for parameter in before])
        assert relative[layer] == pytest.approx((torch.stack(shifts).norm() / sizes.norm()).item(), rel=1e-6)


def test_embeddings_belong_to_no_layer(base, written):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_input_embeddings().weight.add_(1.0)
    assert weight_divergence(written("base", base), written("tuned", changed))[0] == [0.0] * LAYERS


def test_the_layers_of_a_deep_model_are_told_by_number_and_not_by_name(written):
    deep = tiny_model("gpt_neox", layers=11)
    sums, _ = weight_divergence(written("base", deep), written("tuned", perturbed(deep, 10)))
    assert np.argmax(sums) == 10
    assert len(sums) == 11


def test_weights_in_several_files_are_those_in_one(neox, written):
    tuned = perturbed(neox, 1)
    one = weight_divergence(written("base", neox), written("tuned", tuned))
    several = written("several", tuned, max_shard_size="8KB")
    assert len(list(several.glob("*.safetensors"))) > 3
    assert weight_divergence(written("base", neox), several) == one


def test_models_of_other_parameters_are_refused_with_the_names(written, neox):
    with pytest.raises(RlsaeError, match=r"differ in their parameters: .*(gpt_neox|transformer)\.") as caught:
        weight_divergence(written("base", neox), written("tuned", tiny_model("gpt2")))
    assert "base" in str(caught.value)
    assert "tuned" in str(caught.value)


def test_models_of_other_depth_are_refused(written, neox):
    with pytest.raises(RlsaeError, match=r"differ in their parameters: .*layers\.3\."):
        weight_divergence(written("base", neox), written("tuned", tiny_model("gpt_neox", layers=4)))


def test_models_of_other_shapes_are_refused_with_parameter_and_shapes(written, neox):
    config = copy.deepcopy(neox.config)
    config.intermediate_size = 20
    with pytest.raises(
        RlsaeError,
        match=r"layers\.0\.mlp\..*: shape \(16, 24\) in .*base, \(16, 20\) in .*tuned; the models cannot be compared",
    ):
        weight_divergence(written("base", neox), written("tuned", type(neox)(config)))


def test_a_folder_without_weights_is_named(written, neox, tmp_path):
    with pytest.raises(RlsaeError, match="holds no safetensors weights"):
        weight_divergence(written("base", neox), tmp_path)


# --- activations -------------------------------------------------------------------------------------------------


@pytest.fixture
def surveys(tmp_path):
    """Function of rows and tokens: the base's survey and another one."""

    def stores(acts, tokens=TOKENS):
        write_store(tmp_path / "base", TOKENS, ACTS)
        write_store(tmp_path / "tuned", tokens, acts)
        return ActivationStore(tmp_path / "base"), ActivationStore(tmp_path / "tuned")

    return stores


def test_the_activation_measure_is_the_ratio_of_its_two_sums(surveys):
    tuned = shifted([0.1, 1.0, 0.5])
    found, _ = activation_divergence(*surveys(tuned))
    for layer in range(LAYERS):
        before, after = ACTS[layer].astype(np.float32).astype(float), tuned[layer].astype(np.float32).astype(float)
        shift, size = np.linalg.norm(after - before, axis=1).sum(), np.linalg.norm(before, axis=1).sum()
        assert found[layer] == pytest.approx(shift / size, rel=1e-9)


def test_equal_activations_differ_by_exactly_nothing_in_every_resample(surveys):
    found, resampled_RL = activation_divergence(*surveys(ACTS))
    assert found == [0.0] * LAYERS
    assert not resampled_RL.any()


def test_documents_and_not_rows_are_resampled(surveys):
    # One document moved: resamples hold it 0, 1, 2... times, so that whole resamples show no shift at all.
    tuned = {layer: rows.copy() for layer, rows in ACTS.items()}
    tuned[0][TOKENS.start[3] : TOKENS.start[4]] += 5
    _, resampled_RL = activation_divergence(*surveys(tuned))
    assert np.mean(resampled_RL[:, 0] == 0) == pytest.approx((1 - 1 / 10) ** 10, abs=0.05)


def test_surveys_of_other_tokens_are_refused(surveys):
    with pytest.raises(RlsaeError, match="hold different tokens; both must come from one tokens artifact"):
        activation_divergence(*surveys(ACTS, tokens_of(random_documents(np.diff(TOKENS.start), seed=1))))


def test_surveys_of_other_documents_are_refused(surveys):
    moved = tokens_of([*np.split(TOKENS.token, [7])], held_out=[False, False])
    with pytest.raises(RlsaeError, match="hold different tokens"):
        activation_divergence(*surveys(ACTS, moved))


# --- choices -----------------------------------------------------------------------------------------------------


def test_a_tuning_that_changed_nothing_measures_exactly_nothing_and_says_so(measure):
    for by in MEASURES:
        folder = measure({"by": by, "order": "highest", "count": 2})
        for name in MEASURES:
            assert values(folder, name) == [0.0] * LAYERS
        assert chosen(folder)["layers"] == [0, 1]
        assert chosen(folder)["why"] == f"undetermined: {by} is 0 in every layer; the first 2 are taken"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"by": "weight_l2_sum", "order": "highest", "count": 1}, [2]),
        ({"by": "weight_l2_sum", "order": "highest", "count": 2}, [0, 2]),
        ({"by": "weight_l2_sum", "order": "lowest", "count": 1}, [1]),
        ({"by": "weight_l2_relative", "order": "highest", "count": 1}, [2]),
        ({"by": "activation_l2_relative", "order": "highest", "count": 1}, [1]),
        ({"by": "activation_l2_relative", "order": "lowest", "count": 2}, [0, 2]),
        ({"order": "first", "count": 2}, [0, 1]),
        ({"order": "last", "count": 2}, [1, 2]),
        ("all", [0, 1, 2]),
        ([2, 0, 2], [0, 2]),
    ],
    ids=str,
)
def test_layers_are_chosen_by_the_measure_and_the_end_that_the_study_asks_for(measure, neox, choice, expected):
    tuned = perturbed(perturbed(neox, 2, scale=0.2), 0, scale=0.1)
    folder = measure(choice, tuned, shifted([0.0, 1.0, 0.5]))
    assert chosen(folder)["layers"] == expected
    assert Manifest.read(folder).metrics["chosen_layers"] == expected


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"by": "weight_l2_sum", "order": "highest", "count": 1}, "highest weight_l2_sum"),
        ({"by": "activation_l2_relative", "order": "lowest", "count": 1}, "lowest activation_l2_relative"),
        ({"order": "first", "count": 2}, "the first 2"),
        ("all", "all layers"),
        ([1], "listed in the configuration"),
    ],
    ids=str,
)
def test_the_reason_of_a_choice_is_told(measure, neox, choice, why):
    assert chosen(measure(choice, perturbed(neox, 2), shifted([0.1, 0.2, 0.3])))["why"] == why


def test_the_layers_of_another_study_are_taken_over_though_other_layers_moved_more_here(measure, neox):
    other = measure({"count": 1}, perturbed(neox, 2))
    folder = measure({"same_as": "a"}, perturbed(neox, 0), same_as=other)
    assert chosen(folder)["layers"] == [2]
    assert "another study" in chosen(folder)["why"]
    assert Manifest.read(folder).metrics["ranking"]["weight_l2_sum"][0] == 0


def test_the_stability_is_the_share_of_resamples_that_choose_a_layer(measure):
    choice = {"by": "activation_l2_relative", "order": "highest", "count": 1}
    clear = chosen(measure(choice, acts=shifted([0.1, 2.0, 0.1])))
    assert clear["layers"] == [1]
    assert clear["stability"] == {"1": 1.0}
    # Layers 0 and 1 move equally but for noise, each in documents of its own.
    tuned = {layer: rows.copy() for layer, rows in ACTS.items()}
    for layer, documents in [(0, range(5)), (1, range(5, 10))]:
        for document in documents:
            rows = slice(TOKENS.start[document], TOKENS.start[document + 1])
            tuned[layer][rows] += ACTS[layer][rows]
    close = chosen(measure(choice, acts=tuned))
    assert all(0.3 < share < 1.0 for share in close["stability"].values())


def test_a_choice_by_weights_has_no_stability_since_nothing_was_sampled(measure, neox):
    folder = measure({"count": 1}, perturbed(neox, 1))
    assert chosen(folder)["stability"] is None
    assert Manifest.read(folder).metrics["choice_stability"] is None


@pytest.mark.parametrize("order", ["highest", "lowest", "first", "last"])
def test_more_layers_than_the_model_has_are_refused_with_both_numbers(measure, order):
    with pytest.raises(RlsaeError, match=r"layers\.count: 4 layers are asked for, the model has 3"):
        measure({"order": order, "count": 4})


def test_a_listed_layer_that_the_model_does_not_have_is_refused(measure):
    with pytest.raises(RlsaeError, match="layers: layer 3 is asked for, the model has layers 0 to 2"):
        measure([0, 3])


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_layer_and_measure_with_rank_and_interval(measure, neox):
    folder = measure("all", perturbed(neox, 2), shifted([0.1, 1.0, 0.5]))
    table = pd.read_parquet(folder / "layers.parquet")
    assert list(table.columns) == ["layer", "measure", "value", "ci_low", "ci_high", "rank"]
    assert len(table) == LAYERS * len(MEASURES)
    for name in MEASURES:
        rows = table[table.measure == name].sort_values("rank")
        assert rows["rank"].tolist() == [1, 2, 3]
        assert rows.value.is_monotonic_decreasing
        assert rows.layer.tolist() == Manifest.read(folder).metrics["ranking"][name]
    measured = table[table.measure == "activation_l2_relative"]
    assert ((measured.ci_low < measured.value) & (measured.value < measured.ci_high)).all()
    assert table[table.measure != "activation_l2_relative"][["ci_low", "ci_high"]].isna().all(axis=None)


def test_the_table_is_also_written_as_text(measure, neox):
    folder = measure("all", perturbed(neox, 2))
    text = pd.read_csv(folder / "layers.tsv", sep="\t")
    pd.testing.assert_frame_equal(text, pd.read_parquet(folder / "layers.parquet"), check_dtype=False)


def test_equal_measurements_give_equal_bytes(measure, neox):
    folders = [measure({"by": "activation_l2_relative"}, perturbed(neox, 1), shifted([0.1, 1.0, 0.5])) for _ in range(2)]
    first, second = ((folder / "manifest.json").read_bytes() for folder in folders)
    assert first == second
    assert json.loads(first)["outputs"].keys() == {"layers.parquet", "layers.tsv", "chosen.json"}
