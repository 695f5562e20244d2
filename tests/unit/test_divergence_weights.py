"""How far the weights of each layer moved: whole layers and their components."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_artifacts import tiny_model
from small_models import by_measure, perturbed

from rlsae.divergence.weights import weight_divergence
from rlsae.errors import RlsaeError
from rlsae.models import blocks, component

LAYERS = 3
MEASURES = ["weight_l2_sum", "weight_l2", "weight_l2_relative"]


@pytest.fixture(scope="module", params=["gpt_neox", "gpt2", "llama"])
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


def test_equal_weights_do_not_differ_in_any_layer_or_component(base, written):
    found = weight_divergence(written("base", base), written("tuned", base))
    assert {m.component for m in found} == {"layer", "attention", "mlp", "norms"}
    assert {m.measure for m in found} == set(MEASURES)
    for measured in found:
        assert measured.values_L.tolist() == [0.0] * LAYERS


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_what_changed_is_told_by_layer_and_component_and_nothing_else_moved(base, written, part, layer):
    found = weight_divergence(written("base", base), written("tuned", perturbed(base, layer, part)))
    for measured in found:
        expected = measured.component in ("layer", part)
        assert [value > 0.01 for value in measured.values_L] == [expected and number == layer for number in range(LAYERS)]
        assert not expected or measured.ranking[0] == layer


def test_norms_are_told_apart_from_attention_and_mlp(base, written):
    changed = copy.deepcopy(base)
    norm = next(module for module in blocks(changed)[1].children() if not any(p.dim() == 2 for p in module.parameters()))
    with torch.no_grad():
        norm.weight.add_(0.5)
    found = weight_divergence(written("base", base), written("tuned", changed))
    moved = {m.component for m in found if m.measure == "weight_l2" and m.values_L[1] > 0}
    assert moved == {"layer", "norms"}


def test_the_measures_are_the_sums_of_their_definitions(base, written):
    tuned = base
    for layer, scale in enumerate([0.02, 0.3, 0.1]):
        tuned = perturbed(perturbed(tuned, layer, "mlp", scale), layer, "attention", scale / 2)
    found = weight_divergence(written("base", base), written("tuned", tuned))
    for part in ("layer", "mlp", "attention"):
        values = by_measure(found, part)
        for layer in range(LAYERS):
            before, after = (
                list(component(blocks(model)[layer], "block" if part == "layer" else part).parameters())
                for model in (base, tuned)
            )
            shifts = torch.stack([(b.double() - a.double()).norm() for a, b in zip(before, after, strict=True)])
            sizes = torch.stack([parameter.double().norm() for parameter in before])
            assert values["weight_l2_sum"][layer] == pytest.approx(shifts.sum().item(), rel=1e-6)
            assert values["weight_l2"][layer] == pytest.approx(shifts.norm().item(), rel=1e-6)
            assert values["weight_l2_relative"][layer] == pytest.approx((shifts.norm() / sizes.norm()).item(), rel=1e-6)


def test_embeddings_belong_to_no_layer(base, written):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.get_input_embeddings().weight.add_(1.0)
    found = weight_divergence(written("base", base), written("tuned", changed))
    assert not any(measured.values_L.any() for measured in found)


def test_the_layers_of_a_deep_model_are_told_by_number_and_not_by_name(written):
    deep = tiny_model("gpt_neox", layers=11)
    values = by_measure(weight_divergence(written("base", deep), written("tuned", perturbed(deep, 10))), "layer")
    assert np.argmax(values["weight_l2_sum"]) == 10
    assert len(values["weight_l2_sum"]) == 11


def test_weights_in_several_files_are_those_in_one(neox, written):
    tuned = perturbed(neox, 1)
    one = weight_divergence(written("base", neox), written("tuned", tuned))
    several = written("several", tuned, max_shard_size="8KB")
    assert len(list(several.glob("*.safetensors"))) > 3
    assert by_measure(weight_divergence(written("base", neox), several), "layer") == by_measure(one, "layer")


def test_weights_in_half_precision_are_read(neox, written):
    half = copy.deepcopy(neox).to(torch.bfloat16)
    values = by_measure(weight_divergence(written("base", half), written("tuned", perturbed(half, 1))), "layer")
    assert np.argmax(values["weight_l2"]) == 1


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
