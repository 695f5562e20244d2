"""The divergence stage: its tables, what it says of checkpoints, the choice of layers, and what it refuses."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from small_artifacts import finish, random_documents, read_json, tiny_model, tokens_of, write_store, write_tokens
from small_models import perturbed
from small_tunings import entry

from rlsae.artifacts import Manifest
from rlsae.config.studies import Measure
from rlsae.divergence import function, stage
from rlsae.divergence.stage import Policy, build_divergence
from rlsae.errors import RlsaeError
from rlsae.models import save

LAYERS = 3
MEASURES = list(get_args(Measure))
TOKENS = tokens_of(random_documents([5, 17, 3, 40, 9, 28, 31, 12, 2, 20]))
RNG = np.random.default_rng(0)
ACTS = {layer: RNG.normal(0, 1 + layer, (int(TOKENS.start[-1]), 8)) for layer in range(LAYERS)}


def shifted(scales):
    """The rows of the base, moved by noise of another size in each layer."""
    rng = np.random.default_rng(1)
    return {layer: ACTS[layer] + scale * rng.normal(size=ACTS[layer].shape) for layer, scale in enumerate(scales)}


@pytest.fixture(scope="module")
def neox(tokenizer):
    return tiny_model("gpt_neox", vocabulary=len(tokenizer))


@pytest.fixture
def measure(tmp_path, neox, tokenizer, corpus, monkeypatch):
    """Function of settings: folder of the divergence artifact of two models and their surveys."""
    monkeypatch.setattr(function, "PROMPTS", 8)
    count = iter(range(100))
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, responses):\n    return [text.count('e') for text in responses]\n")
    recipe = {"tuning": entry().settings(), "reward": {"kind": "python", "function": "reward"}}

    def divergence(layers, tuned=neox, acts=ACTS, same_as=None, checkpoints=None, checkpoint=None, name=None):
        folder = tmp_path / (name or str(next(count)))
        policies = []
        for policy, kind, model, rows in [("tiny", "models", neox, ACTS), ("tiny.ppo", "policies", tuned, acts)]:
            save(model, tokenizer, folder / kind / policy / "model")
            artifact = finish(folder / kind / policy, kind, parameters=recipe)
            survey = write_store(folder / "activations" / policy / "survey", TOKENS, rows)
            finish(survey, "activations", parameters={"checkpoint": checkpoint if kind == "policies" else None})
            policies.append(Policy(artifact, artifact / "model", survey))
        surveys = {}
        for step, (model, rows) in (checkpoints or {}).items():
            save(model, tokenizer, folder / "policies/tiny.ppo/checkpoints" / str(step))
            surveys[step] = write_store(folder / "activations" / f"tiny.ppo@{step}" / "survey", TOKENS, rows)
        tokens, out = write_tokens(folder / "tokens/tiny.reviews", TOKENS), folder / "divergence" / "a"
        build_divergence({"layers": layers}, out, None, *policies, surveys, tokens, corpus, reward, same_as)
        return out

    return divergence


def values(folder, measure, component=None):
    table = pd.read_parquet(folder / "layers.parquet")
    part = component or {"weight": "layer", "activation": "mlp"}.get(measure.split("_")[0], "layer")
    return table[(table.measure == measure) & (table.component == part)].sort_values("layer").value.tolist()


def chosen(folder):
    return read_json(folder / "chosen.json")


# --- choices -----------------------------------------------------------------------------------------------------


def test_a_tuning_that_changed_nothing_measures_exactly_nothing(measure):
    table = pd.read_parquet(measure("all") / "layers.parquet")
    assert set(table.measure) == set(MEASURES)
    assert not table[["value"]].any(axis=None)
    assert not table[["ci_low", "ci_high"]].fillna(0).any(axis=None)


@pytest.mark.parametrize("by", ["weight_l2_sum", "activation_cka", "reward_swap_out"])
def test_a_choice_between_layers_that_did_not_move_is_told_as_undetermined(measure, by):
    found = chosen(measure({"by": by, "order": "highest", "count": 2}))
    assert found["layers"] == [0, 1]
    assert not found["determined"]
    assert found["why"] == f"undetermined: {by} is 0 in layers 0, 1, 2 alike; the first of them are taken"


def test_only_the_layers_that_are_alike_are_undetermined(measure, neox):
    found = chosen(measure({"by": "weight_l2", "order": "highest", "count": 2}, perturbed(neox, 2)))
    assert found["layers"] == [0, 2]
    assert not found["determined"]
    assert "in layers 0, 1 alike" in found["why"]
    assert chosen(measure({"by": "weight_l2", "order": "highest", "count": 1}, perturbed(neox, 2)))["determined"]


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


# --- the tables --------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_layer_measure_and_component_with_rank_and_interval(measure, neox):
    folder = measure("all", perturbed(perturbed(neox, 2), 0, scale=0.03), shifted([0.1, 1.0, 0.5]))
    table = pd.read_parquet(folder / "layers.parquet")
    assert list(table.columns) == ["layer", "measure", "component", "value", "ci_low", "ci_high", "rank"]
    assert not table.duplicated(["layer", "measure", "component"]).any()
    assert set(table[table.measure == "weight_l2"].component) == {"layer", "attention", "mlp", "norms"}
    assert set(table[table.measure == "activation_cka"].component) == {"mlp"}
    assert set(table[table.measure == "kl_swap_in"].component) == {"layer"}
    ranking = Manifest.read(folder).metrics["ranking"]
    assert sorted(ranking) == sorted(MEASURES)
    for (name, component), rows in table.groupby(["measure", "component"]):
        ordered = rows.sort_values("rank")
        assert ordered["rank"].tolist() == [1, 2, 3]
        assert ordered.value.abs().is_monotonic_decreasing
        if component in ("layer", "mlp") and not (component == "mlp" and name.startswith("weight")):
            assert ordered.layer.tolist() == ranking[name]
    sampled = ~table.measure.str.startswith("weight")
    assert (table[sampled].ci_low <= table[sampled].value).all()
    assert (table[sampled].value <= table[sampled].ci_high).all()
    assert table[~sampled][["ci_low", "ci_high"]].isna().all(axis=None)


def test_every_table_is_also_written_as_text(measure, neox):
    folder = measure("all", perturbed(neox, 2))
    for name in ("layers", "steps"):
        text = pd.read_csv(folder / f"{name}.tsv", sep="\t")
        pd.testing.assert_frame_equal(text, pd.read_parquet(folder / f"{name}.parquet"), check_dtype=False)


def test_checkpoints_have_the_same_table_and_the_finished_policy_comes_last(measure, neox):
    early, late = perturbed(neox, 1, scale=0.05), perturbed(neox, 1, scale=0.1)
    folder = measure("all", late, shifted([0.0, 1.0, 0.5]), checkpoints={1: (early, shifted([0.0, 0.3, 0.2]))})
    steps, layers = (pd.read_parquet(folder / f"{name}.parquet") for name in ("steps", "layers"))
    assert list(steps.columns) == ["step", *layers.columns]
    assert steps.step.unique().tolist() == [1, entry().batches]
    last = steps[steps.step == entry().batches].drop(columns="step").reset_index(drop=True)
    pd.testing.assert_frame_equal(last, layers)
    for name in ("weight_l2", "activation_l2_relative"):
        moved = steps[(steps.measure == name) & (steps.layer == 1) & steps.component.isin(["layer", "mlp"])]
        assert moved.groupby("step").value.max().is_monotonic_increasing
    assert (folder / "figures/steps.svg").exists()


def test_a_tuning_without_checkpoints_has_its_end_alone_and_no_figure_of_steps(measure, neox):
    folder = measure("all", perturbed(neox, 2))
    assert pd.read_parquet(folder / "steps.parquet").step.unique().tolist() == [entry().batches]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["agreement.svg", "layers.svg"]


def test_a_study_of_a_checkpoint_is_told_by_its_step(measure, neox):
    folder = measure("all", perturbed(neox, 2), checkpoint=2)
    assert pd.read_parquet(folder / "steps.parquet").step.unique().tolist() == [2]


def test_a_run_that_was_killed_does_not_measure_finished_checkpoints_again(measure, neox, monkeypatch):
    checkpoints = {step: (perturbed(neox, 1, scale=step / 10), ACTS) for step in (1, 2)}
    whole = measure("all", perturbed(neox, 1), checkpoints=checkpoints)
    measured, original = [], stage.weight_divergence

    def killed_at_the_second(base, tuned):
        measured.append(tuned.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(base, tuned)

    monkeypatch.setattr(stage, "weight_divergence", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure("all", perturbed(neox, 1), checkpoints=checkpoints, name="killed")
    resumed = measure("all", perturbed(neox, 1), checkpoints=checkpoints, name="killed")
    assert measured == ["1", "2", "2", "model"]
    assert (resumed / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_the_agreement_of_the_measures_is_kendalls_tau_of_their_order_of_the_layers(measure, neox):
    folder = measure("all", perturbed(perturbed(neox, 2), 1, scale=0.05), shifted([0.1, 1.0, 0.5]))
    table = pd.read_csv(folder / "agreement.tsv", sep="\t")
    assert list(table.columns) == ["measure", "other", "kendall_tau"]
    tau = table.set_index(["measure", "other"]).kendall_tau
    assert len(table) == len(MEASURES) ** 2
    for one, other in [("weight_l2_sum", "activation_l2_relative"), ("weight_l2", "kl_swap_in")]:
        first, second = (np.abs(values(folder, name)) for name in (one, other))
        pairs = [(i, j) for i in range(LAYERS) for j in range(i)]
        concordant = [np.sign((first[i] - first[j]) * (second[i] - second[j])) for i, j in pairs]
        assert tau[one, other] == tau[other, one] == pytest.approx(np.mean(concordant))
    assert tau["weight_l2", "weight_l2"] == 1


def test_where_nothing_moved_the_agreement_is_undefined(measure):
    assert pd.read_csv(measure("all") / "agreement.tsv", sep="\t").kendall_tau.isna().all()


def test_figures_are_svg_without_dates_and_name_every_measure(measure, neox):
    folder = measure("all", perturbed(neox, 2), shifted([0.1, 1.0, 0.5]))
    for path in (folder / "figures").iterdir():
        text = path.read_text()
        assert text.startswith("<?xml")
        assert "<dc:date>" not in text
        assert "#010101" not in text
    assert all(name in (folder / "figures/agreement.svg").read_text() for name in MEASURES)


def test_equal_measurements_give_equal_bytes(measure, neox):
    folders = [measure({"by": "activation_l2_relative"}, perturbed(neox, 1), shifted([0.1, 1.0, 0.5])) for _ in range(2)]
    first, second = ((folder / "manifest.json").read_bytes() for folder in folders)
    assert first == second
    outputs = {"layers.parquet", "layers.tsv", "steps.parquet", "steps.tsv", "agreement.tsv", "chosen.json", "figures"}
    assert json.loads(first)["outputs"].keys() == outputs
