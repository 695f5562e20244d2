"""Where every artifact lies and which settings shape it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rlsae.errors import RlsaeError
from rlsae.expand import parse_config
from rlsae.layout import (
    Layout,
    folder_layer_count,
    kind_of,
    layers_of,
    model_of,
    policy_folder,
    run_this_checkout,
    weights_folder,
)


def layout(raw):
    return Layout(parse_config(raw))


def layers(raw, value, study="main"):
    """The layers that a study's configuration alone tells."""
    raw["studies"][study]["layers"] = value
    return layout(raw).static_layers(study)


# --- names and folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "model", "folder", "weights"),
    [
        ("tiny", "tiny", "models/tiny", "models/tiny/model"),
        ("tiny.ppo", "tiny", "policies/tiny.ppo", "policies/tiny.ppo/model"),
        ("tiny.ppo@12", "tiny", "policies/tiny.ppo", "policies/tiny.ppo/checkpoints/12"),
    ],
)
def test_a_policy_lies_in_the_artifact_of_its_model_or_tuning(policy, model, folder, weights):
    assert model_of(policy) == model
    assert policy_folder(policy) == Path("results") / folder
    assert weights_folder(policy) == Path("results") / weights


def test_a_dump_is_named_by_its_layers():
    assert kind_of([3, 11]) == "layers-3-11"
    assert layers_of("layers-3-11") == [3, 11]
    assert layers_of("survey") is None


def test_a_study_compares_its_model_with_its_tuning(raw):
    study = parse_config(raw).studies["main"]
    assert (study.base, study.tuned) == ("tiny", "tiny.ppo")


# --- settings ----------------------------------------------------------------------------------------------------


def test_settings_of_the_tokens_do_not_shape_the_documents(raw):
    before = layout(raw)
    raw["corpora"]["reviews"] |= {"context_length": 32, "drop_positions": 1}
    after = layout(raw)
    assert after.corpus_settings("reviews") == before.corpus_settings("reviews")
    assert after.token_settings("reviews") == {"seed": 0, "context_length": 32, "drop_positions": 1}
    assert before.token_settings("reviews") == {"seed": 0, "context_length": 64, "drop_positions": 0}


def test_a_pretrained_model_is_shaped_by_the_context_length_of_its_corpus(raw):
    raw["corpora"]["reviews"]["context_length"] = 32
    assert layout(raw).model_settings("tiny")["context_length"] == 32


def test_a_tuning_is_shaped_by_its_reward(raw):
    before = layout(raw).policy_settings("ppo")
    raw["rewards"]["lexicon"]["scale"] = 0.5
    after = layout(raw).policy_settings("ppo")
    assert before["tuning"] == after["tuning"]
    assert before["reward"] != after["reward"]


def test_no_settings_hold_a_path_of_this_machine(raw, tmp_path):
    raw["corpora"]["reviews"] = {"source": "file", "path": str(tmp_path / "reviews.txt")}
    raw["models"]["tiny"] = {"source": "path", "path": str(tmp_path / "tiny")}
    raw["rewards"]["lexicon"]["path"] = str(tmp_path / "words.tsv")
    found = layout(raw)
    told = [found.corpus_settings("reviews"), found.model_settings("tiny"), found.policy_settings("ppo")]
    assert str(tmp_path) not in json.dumps(told)


def test_a_survey_has_all_layers_and_its_own_number_of_rows(raw):
    raw["activations"]["mlp"] = {"survey_rows": 10, "rows": 20}
    survey = layout(raw).activation_settings("mlp", "survey", "tiny")
    dump = layout(raw).activation_settings("mlp", "layers-1-3", "tiny")
    assert (survey["layers"], survey["rows"]) == (None, 10)
    assert (dump["layers"], dump["rows"]) == ([1, 3], 20)


def test_the_dumps_of_two_checkpoints_of_one_tuning_differ_in_their_settings(raw):
    found = layout(raw)
    steps = [found.activation_settings("mlp", "survey", policy)["checkpoint"] for policy in ("tiny.ppo", "tiny.ppo@8")]
    assert steps == [None, 8]


def test_the_number_of_parts_is_rounded_up(raw):
    raw["activations"]["mlp"] = {"survey_rows": 1024, "rows": 2049, "rows_per_part": 1024}
    assert layout(raw).parts("mlp", "survey") == 1
    assert layout(raw).parts("mlp", "layers-0") == 3


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([3, 1, 1], [1, 3]),
        ("all", [0, 1, 2, 3]),
        ({"order": "first", "count": 2}, [0, 1]),
        ({"order": "last", "count": 3}, [1, 2, 3]),
        ({"order": "last", "count": 4}, [0, 1, 2, 3]),
        ({"order": "highest", "count": 2}, None),
        ({"order": "lowest", "count": 2}, None),
    ],
    ids=str,
)
def test_layers_are_known_from_the_configuration_unless_they_must_be_measured(raw, value, expected):
    assert layers(raw, value) == expected


def test_layers_of_the_same_study_are_followed_to_their_end(raw):
    main = raw["studies"]["main"]
    raw["studies"] |= {"b": main | {"layers": {"same_as": "main"}}, "c": main | {"layers": {"same_as": "b"}}}
    assert layers(raw, [2]) == [2]
    assert layout(raw).static_layers("c") == [2]
    assert layout(raw).layer_source("c") == "main"


def test_more_layers_than_the_model_has_are_refused(raw):
    for order in ("first", "highest"):
        raw["studies"]["main"]["layers"] = {"order": order, "count": 5}
        with pytest.raises(RlsaeError, match=r"studies\.main\.layers\.count: 5 layers are asked for, the model has 4"):
            layout(raw).check_layers()
    raw["studies"]["main"]["layers"] = [1, 4]
    with pytest.raises(RlsaeError, match=r"studies\.main\.layers: layer 4 is asked for, the model has layers 0 to 3"):
        layout(raw).check_layers()


def test_the_number_of_layers_of_a_hub_model_is_not_known_before_it_is_loaded(raw):
    raw["models"]["tiny"] = {"source": "hub", "repository": "EleutherAI/pythia-70m"}
    assert layers(raw, "all") is None


def test_the_number_of_layers_of_a_local_model_is_read_from_its_folder(raw, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    raw["models"]["tiny"] = {"source": "path", "path": str(tmp_path)}
    assert layers(raw, "all") == [0, 1, 2]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_each_family_may_name_its_number_of_layers_differently(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({key: 7}))
    assert folder_layer_count(tmp_path) == 7


@pytest.mark.parametrize("content", [None, "{"], ids=["no file", "no JSON"])
def test_a_folder_without_a_readable_config_is_named(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RlsaeError, match=r"is no transformers model: it has no readable config\.json"):
        folder_layer_count(tmp_path)


def test_a_config_without_a_number_of_layers_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RlsaeError, match=r"config\.json does not say how many layers the model has"):
        folder_layer_count(tmp_path)


def test_measured_layers_are_read_from_the_choice_once_it_was_made(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw["studies"]["other"] = raw["studies"]["main"] | {"layers": {"same_as": "main"}}
    found = layout(raw)
    assert found.chosen_layers("other") is None
    folder = tmp_path / "results" / "divergence" / "main"
    folder.mkdir(parents=True)
    (folder / "chosen.json").write_text(json.dumps({"layers": [0, 2]}))
    assert found.chosen_layers("other") == [0, 2]


# --- artifacts ---------------------------------------------------------------------------------------------------


def test_the_artifacts_of_a_study_follow_the_chain_up_to_a_choice_that_is_not_made(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(artifact.folder) for artifact in layout(raw).artifacts("main")] == [
        "results/corpora/reviews",
        "results/models/tiny",
        "results/policies/tiny.ppo",
        "results/tokens/tiny.reviews",
        "results/activations/tiny.reviews/mlp/survey",
        "results/activations/tiny.ppo.reviews/mlp/survey",
        "results/divergence/main",
    ]


def test_the_surveys_of_the_checkpoints_are_what_the_divergence_is_made_from(raw):
    raw["tunings"]["ppo"] |= {"batches": 9, "checkpoints": 2}
    raw["studies"]["of-a-checkpoint"] = raw["studies"]["main"] | {"tuning": "ppo@3"}
    for study, steps in (("main", [3, 6]), ("of-a-checkpoint", [])):
        (divergence,) = (artifact for artifact in layout(raw).artifacts(study) if artifact.stage == "divergence")
        found = [str(folder) for folder in divergence.inputs if "@" in str(folder)]
        own = ["results/activations/tiny.ppo@3.reviews/mlp/survey"] if study == "of-a-checkpoint" else []
        assert found == own + [f"results/activations/tiny.ppo@{step}.reviews/mlp/survey" for step in steps]


def test_every_policy_layer_and_recipe_has_its_dictionaries(raw):
    raw["studies"]["main"]["layers"] = [1, 3]
    found = [artifact for artifact in layout(raw).artifacts("main") if artifact.stage == "dictionaries"]
    assert {str(artifact.folder) for artifact in found} == {
        f"results/dictionaries/{policy}.reviews/mlp/layers-1-3/layer{layer}/{dictionary}"
        for policy in ("tiny", "tiny.ppo")
        for layer in (1, 3)
        for dictionary in ("small", "big")
    }
    assert {artifact.settings["expansion"] for artifact in found} == {1.0, 2.0}


def test_a_study_with_known_layers_names_its_whole_chain(raw):
    raw["studies"]["main"]["layers"] = [0]
    stages = list(dict.fromkeys(artifact.stage for artifact in layout(raw).artifacts("main")))
    assert stages == [
        "corpora",
        "models",
        "policies",
        "tokens",
        "activations",
        "divergence",
        "dictionaries",
        "comparison",
        "interpretation",
        "reports",
    ]


def test_every_corpus_of_a_study_is_among_its_artifacts(raw):
    raw["corpora"] |= {"prompts": {"source": "generated"}, "pretraining": {"source": "generated"}}
    raw["tunings"]["ppo"]["corpus"] = "prompts"
    raw["models"]["tiny"]["corpus"] = "pretraining"
    found = {artifact.folder.name for artifact in layout(raw).artifacts("main") if artifact.stage == "corpora"}
    assert found == {"reviews", "prompts", "pretraining"}


def test_an_artifact_names_the_files_outside_the_results_that_it_is_made_from(raw, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    raw["corpora"]["reviews"] = {"source": "file", "path": "/data/reviews.txt"}
    raw["models"]["tiny"] = {"source": "path", "path": str(tmp_path)}
    raw["rewards"]["lexicon"]["path"] = "/data/words.tsv"
    files = {artifact.stage: artifact.files for artifact in layout(raw).artifacts("main") if artifact.files}
    assert files == {
        "corpora": {"source": Path("/data/reviews.txt")},
        "models": {"model": tmp_path},
        "policies": {"reward": Path("/data/words.tsv")},
        "divergence": {"reward": Path("/data/words.tsv")},
    }


@pytest.mark.parametrize("keep", [True, False])
def test_only_stores_that_need_not_be_kept_are_temporary_and_that_shapes_no_number(raw, keep):
    kept = layout(raw).activation_settings("mlp", "survey", "tiny")
    raw["activations"]["mlp"]["keep"] = keep
    raw["studies"]["main"]["layers"] = [0]
    temporary = {artifact.stage for artifact in layout(raw).artifacts("main") if artifact.temporary}
    assert temporary == (set() if keep else {"activations"})
    assert layout(raw).activation_settings("mlp", "survey", "tiny") == kept


def test_the_jobs_of_a_workflow_run_its_own_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PATH", "/bin")
    run_this_checkout("/checkout")
    assert os.environ["PYTHONPATH"] == f"/checkout{os.pathsep}/elsewhere"
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/bin"
    monkeypatch.delenv("PYTHONPATH")
    run_this_checkout("/checkout")
    assert os.environ["PYTHONPATH"] == "/checkout"


def test_a_study_of_a_checkpoint_uses_the_artifact_of_its_tuning_and_dumps_of_its_own(raw):
    raw["tunings"]["ppo"]["checkpoints"] = 2
    raw["studies"]["main"]["tuning"] = "ppo@8"
    folders = {str(artifact.folder) for artifact in layout(raw).artifacts("main")}
    assert "results/policies/tiny.ppo" in folders
    assert "results/activations/tiny.ppo@8.reviews/mlp/survey" in folders
